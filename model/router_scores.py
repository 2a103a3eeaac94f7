"""Router scores: what each way to make them of the logits is, and what follows from it.

A new one is a name in configs/feed_forward.py (`SCORES`) and a row here; or, in a file of one's
own, a call of `add_scores`.

T tokens, E experts, N null experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs import feed_forward
from configs.checks import require


@dataclass(frozen=True, kw_only=True)
class ScoreKind:
    """One way to make scores of logits."""

    forward: Callable[[jax.Array], jax.Array]
    """Float32 logits [T, E] to scores, each at least 0 and rising with its own logit."""
    inverse: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    """(scores [T, N], a score [T, 1] and its logit []) to the logits that would have such scores.
    Where the scores are shared, beside that one logit, the others as they are."""
    is_shared: bool
    """Whether a token's scores sum to 1, so that each depends on all logits: twins of an expert
    would halve it."""
    is_bounded: bool
    """Whether scores lie in [0, 1]."""


def _softmax_logit(score_TN: jax.Array, known_T1: jax.Array, logit: jax.Array) -> jax.Array:
    return logit + jnp.log(score_TN / jnp.maximum(known_T1, 1e-20))


def _sigmoid_logit(score_TN: jax.Array, known_T1: jax.Array, logit: jax.Array) -> jax.Array:
    del known_T1, logit
    score_TN = jnp.minimum(score_TN, 1 - 1e-7)
    return jnp.log(score_TN) - jnp.log1p(-score_TN)


def _sqrt_softplus_logit(score_TN: jax.Array, known_T1: jax.Array, logit: jax.Array) -> jax.Array:
    del known_T1, logit
    softplus_TN = score_TN**2
    return softplus_TN + jnp.log(-jnp.expm1(-softplus_TN))


SCORES: dict[str, ScoreKind] = {
    "softmax": ScoreKind(
        forward=lambda logits: jax.nn.softmax(logits, axis=-1),
        inverse=_softmax_logit,
        is_shared=True,
        is_bounded=True,
    ),
    "sigmoid": ScoreKind(
        forward=jax.nn.sigmoid,
        inverse=_sigmoid_logit,
        is_shared=False,
        is_bounded=True,
    ),
    "sqrt_softplus": ScoreKind(
        forward=lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
        inverse=_sqrt_softplus_logit,
        is_shared=False,
        is_bounded=False,
    ),
}
BUILT_IN = frozenset(SCORES)


def add_scores(name: str, kind: ScoreKind) -> None:
    """Router scores of one's own, by the name that configs give them (`router.scores`).

    Raises:
      UserError: the name of scores that are here.
    """
    require(
        name not in BUILT_IN,
        f"there are router scores {name!r} already: give yours another name",
    )
    SCORES[name] = kind
    feed_forward.SCORES.add(name)
