"""How evenly a layer's experts are used: what the router reports, the losses, the load figures.

T tokens, E experts, K experts per token. c_i are the choices expert i received, f_i = c_i / sum(c)
its share, u_i = E f_i its load relative to the mean, P_i the mean over tokens of its score.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterStats(NamedTuple):
    """What one MoE layer reports about one batch; all float32 but the counts."""

    counts_E: jax.Array
    """Choices each expert received from the whole batch, int32."""
    mean_scores_E: jax.Array
    """P_i."""
    z_loss: jax.Array
    """mean(logsumexp(router_logits)^2)."""
    entropy: jax.Array
    """Mean over tokens of the entropy of the scores, nats."""
    num_tokens: jax.Array
    overflow_rows: jax.Array
    bytes_moved: jax.Array


def router_stats(
    router_logits_TE: jax.Array,
    counts_E: jax.Array,
    is_token_T: jax.Array,
    overflow_rows: jax.Array,
    bytes_moved: jax.Array,
) -> RouterStats:
    """Means over the tokens that are not padding."""
    weight_T1 = is_token_T.astype(jnp.float32)[:, None]
    num_tokens = weight_T1.sum()
    log_scores_TE = jax.nn.log_softmax(router_logits_TE, axis=-1)
    scores_TE = jnp.exp(log_scores_TE)
    lse_T1 = jax.nn.logsumexp(router_logits_TE, axis=-1, keepdims=True)
    per_token = 1.0 / jnp.maximum(num_tokens, 1.0)
    return RouterStats(
        counts_E=counts_E,
        mean_scores_E=(scores_TE * weight_T1).sum(axis=0) * per_token,
        z_loss=(lse_T1**2 * weight_T1).sum() * per_token,
        entropy=-(scores_TE * log_scores_TE * weight_T1).sum() * per_token,
        num_tokens=num_tokens,
        overflow_rows=overflow_rows,
        bytes_moved=bytes_moved,
    )


def merge_stats(stats: RouterStats) -> RouterStats:
    """One report from those of several micro-batches of equal size, stacked in dim 0."""
    summed = {"counts_E", "num_tokens", "overflow_rows", "bytes_moved"}
    return RouterStats(
        **{
            name: x.sum(axis=0) if name in summed else x.mean(axis=0)
            for name, x in stats._asdict().items()
        }
    )


def load_balance_loss(counts_E: jax.Array, mean_scores_E: jax.Array) -> jax.Array:
    """E sum_i f_i P_i (Switch Transformer, 2021, eq. 4): 1 when uniform, E when one expert takes
    all.

    The counts carry no gradient and may come from more tokens than the scores: with the global
    batch's counts, balance is asked of the batch and not of each sequence (Qiu et al. 2025).
    """
    counts_E = jax.lax.stop_gradient(counts_E.astype(jnp.float32))
    share_E = counts_E / jnp.maximum(counts_E.sum(), 1.0)
    return counts_E.shape[0] * (share_E * mean_scores_E).sum()


class LoadFigures(NamedTuple):
    """Per-layer load figures, float32; see reference names in docs/first_run.md."""

    load_cv: jax.Array
    """Standard deviation of u_i."""
    load_cv_floor: jax.Array
    """The load_cv that uniform random routing of as many tokens shows: sqrt((E - K) / (T K))."""
    max_violation: jax.Array
    """max u_i - 1 (MaxVio, Wang et al. 2024)."""
    dead_experts: jax.Array
    """Experts with u_i < 0.1."""
    peak_load: jax.Array
    """max c_i / T: 1 when one expert is chosen by every token."""
    mean_k: jax.Array
    """Experts per token."""


def load_figures(counts_E: jax.Array, num_tokens: jax.Array) -> LoadFigures:
    num_experts = counts_E.shape[0]
    counts_E, tokens = counts_E.astype(jnp.float32), jnp.maximum(num_tokens, 1.0)
    choices = jnp.maximum(counts_E.sum(), 1.0)
    relative_E = num_experts * counts_E / choices
    mean_k = choices / tokens
    return LoadFigures(
        load_cv=relative_E.std(),
        load_cv_floor=jnp.sqrt(jnp.maximum(num_experts - mean_k, 0.0) / (tokens * mean_k)),
        max_violation=relative_E.max() - 1.0,
        dead_experts=(relative_E < 0.1).sum().astype(jnp.float32),
        peak_load=counts_E.max() / tokens,
        mean_k=mean_k,
    )
