"""Choosing the next token from logits.

B rows, V vocab.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are greedy."""

    temperature: float = 0.0
    """0 takes the most likely token; above it, softmax(logits / temperature) is sampled."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach top_p (Holtzman et al. 2019)."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise UserError(f"temperature={self.temperature} must be a finite number; 0 is greedy")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.temperature == 0 and self.top_p < 1:
            raise UserError(
                f"top_p={self.top_p} has no effect with temperature=0: set a temperature"
            )


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 [B].

    Args:
      logits_BV: float32 [B, V].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The best logit becomes 0 first, so that the coldest temperature still tends to greedy, where
    # the quotients themselves would overflow.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    logits_BV = logits_BV / max(sampling.temperature, float(np.finfo(np.float32).tiny))
    if sampling.top_p < 1:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def _keep_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """-inf for tokens outside the nucleus; the most likely token always stays."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    mass_before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    is_kept_BV = jnp.take_along_axis(mass_before_BV < top_p, rank_BV, axis=-1) | (rank_BV == 0)
    return jnp.where(is_kept_BV, logits_BV, -jnp.inf)
