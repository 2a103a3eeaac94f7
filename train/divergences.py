"""Divergences between a teacher's distribution p and a student's q, from their logarithms.

Each is a sum over tokens, or over bins into which tokens are merged: then it is at most what it is
over the tokens (data-processing inequality).

B rows, c tokens of a chunk, J tokens kept, N bins, V vocab.
"""

import math
from typing import assert_never

import jax
import jax.numpy as jnp

from configs.distill import DEFAULT_BETA, Divergence

TAIL_FLOOR = 1e-6
"""Least probability of the tail bin, against log(0) when the kept tokens carry everything."""

ROUNDING = 2.0**-16
"""By which a float32 softmax of the same logits, compiled apart, may differ, in parts of it: some
roundings of logits of 100."""

Bins = list[tuple[jax.Array, jax.Array]]
"""Pairs of log p and log q, [..., N] each, N of its own in each pair: together all bins."""


def divergence(kind: Divergence, bins: Bins, beta: float | None = None) -> jax.Array:
    """The divergence of each place, float32 [...]; kind and beta as of configs.distill.LossTerm."""
    total = None
    for log_p, log_q in bins:
        part = _summands(kind, log_p, log_q, beta).sum(axis=-1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _summands(
    kind: Divergence, log_p: jax.Array, log_q: jax.Array, beta: float | None
) -> jax.Array:
    beta = DEFAULT_BETA.get(kind, 0.5) if beta is None else beta
    if kind == "forward_kl":
        return jnp.exp(log_p) * (log_p - log_q)
    if kind == "reverse_kl":
        return jnp.exp(log_q) * (log_q - log_p)
    if kind == "jsd":
        log_m = _mixed(log_p, log_q, beta)
        to_p = jnp.exp(log_p) * (log_p - log_m)
        return beta * to_p + (1.0 - beta) * jnp.exp(log_q) * (log_q - log_m)
    if kind == "skewed_kl":
        return jnp.exp(log_p) * (log_p - _mixed(log_p, log_q, beta))
    if kind == "skewed_reverse_kl":
        return jnp.exp(log_q) * (log_q - _mixed(log_q, log_p, beta))
    if kind == "total_variation":
        return 0.5 * distance(jnp.exp(log_p), jnp.exp(log_q))
    assert_never(kind)


def distance(p: jax.Array, q: jax.Array) -> jax.Array:
    """|p - q|, and 0 of probabilities that differ by rounding alone: the gradient jumps at p = q,
    where rounding would decide it and move a student that is its teacher.
    """
    is_apart = jnp.abs(p - q) > ROUNDING * jnp.maximum(p, q)
    return jnp.where(is_apart, jnp.abs(p - q), 0.0)


def _mixed(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """log(share a + (1 - share) b)."""
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def accepted(bins: Bins) -> jax.Array:
    """The share of drafts by q that p accepts, sum min(p, q) (Leviathan et al. 2023), [...]."""
    parts = [jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)).sum(axis=-1) for log_p, log_q in bins]
    return sum(parts[1:], parts[0])


def kept_and_tail(
    log_q_BcV: jax.Array,
    ids_BcJ: jax.Array,
    log_p_BcJ: jax.Array,
    log_p_tail_Bc: jax.Array | None = None,
) -> Bins:
    """J + 1 bins: the tokens kept, and one for all others.

    Unlike a renormalised top J, the tail leaves a student no reason to empty its own.

    Args:
      log_p_tail_Bc: the tail's log-probability where it is known; None: what the kept ones leave.
        Where it is, ids may be -1: a place that keeps nothing.
    """
    if log_p_tail_Bc is None:
        log_q_BcJ = jnp.take_along_axis(log_q_BcV, ids_BcJ, axis=-1)
        tails = (_log_tail(log_p_BcJ), _log_tail(log_q_BcJ))
    else:
        is_kept_BcJ = ids_BcJ >= 0
        log_q_BcJ = jnp.take_along_axis(log_q_BcV, jnp.maximum(ids_BcJ, 0), axis=-1)
        q_BcJ = jnp.where(is_kept_BcJ, jnp.exp(log_q_BcJ), 0.0)
        log_q_tail_Bc = jnp.log(jnp.maximum(1.0 - q_BcJ.sum(axis=-1), TAIL_FLOOR))
        # Equal bins of next to no probability add nothing to any divergence.
        log_q_BcJ = jnp.where(is_kept_BcJ, log_q_BcJ, EMPTY)
        log_p_BcJ = jnp.where(is_kept_BcJ, log_p_BcJ, EMPTY)
        tails = (jnp.maximum(log_p_tail_Bc, math.log(TAIL_FLOOR)), log_q_tail_Bc)
    return [(log_p_BcJ, log_q_BcJ), (tails[0][..., None], tails[1][..., None])]


EMPTY = -80.0
"""Logarithm of a probability that is nothing, in float32 without underflow."""


def _log_tail(log_probs_BcJ: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(1.0 - jnp.exp(log_probs_BcJ).sum(axis=-1), TAIL_FLOOR))
