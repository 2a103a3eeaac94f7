"""Spikes of loss and gradient: steps that are left out (OptimizerConfig.skip_above)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

DECAY = 0.98
"""Of the running means: they remember about fifty steps."""
FIRST_STEPS = 20
"""Steps that always count, but for numbers that are not finite: the means are of nothing yet."""


class RunningMeans(struct.PyTreeNode):
    """Means of what the steps that counted had, float32 scalars."""

    loss: Any
    grad_norm: Any
    count: Any
    """Steps that counted, int32."""


def no_means() -> RunningMeans:
    return RunningMeans(loss=jnp.float32(0), grad_norm=jnp.float32(0), count=jnp.int32(0))


def is_spike(
    means: RunningMeans, loss: jax.Array, grad_norm: jax.Array, factor: float
) -> jax.Array:
    """Whether the step is to be left out, bool: see OptimizerConfig.skip_above."""
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    is_high = (loss > factor * means.loss) | (grad_norm > factor * means.grad_norm)
    return ~is_finite | (is_high & (means.count >= FIRST_STEPS))


def updated_means(means: RunningMeans, loss: jax.Array, grad_norm: jax.Array) -> RunningMeans:
    """The means with one more step; of the first steps they are plain."""
    weight = jnp.maximum(1 - DECAY, 1.0 / (means.count + 1))

    def moved(mean: jax.Array, x: jax.Array) -> jax.Array:
        return mean + weight * (x - mean)

    return RunningMeans(
        loss=moved(means.loss, loss),
        grad_norm=moved(means.grad_norm, grad_norm),
        count=means.count + 1,
    )
