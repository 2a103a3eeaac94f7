"""Small parts that every model uses: parameters with named axes, RMSNorm, RoPE, the dense SwiGLU.

B batch, L length, D d_model, F d_ff, H heads, C head_dim.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.attention import YarnConfig
from configs.feed_forward import DenseConfig


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    stddev: float,
) -> jax.Array:
    """A float32 parameter drawn from normal(0, stddev); `logical_axes` names its dimensions.

    Dimensions named None only stack matrices (gate and up); see parallel/sharding.py for the names.
    """
    init = nn.with_logical_partitioning(nn.initializers.normal(stddev), logical_axes)
    return cast(jax.Array, module.param(name, init, shape, jnp.float32))


def newest(_: Any, new: Any) -> Any:
    """For `sow`: keeps the value of the last call."""
    return new


def document_segments(positions_BL: jax.Array) -> jax.Array:
    """Numbers the documents of each row, int32 [B, L]: one ends where positions stop rising by
    one.
    """
    is_start_BL = positions_BL[:, 1:] != positions_BL[:, :-1] + 1
    return jnp.pad(jnp.cumsum(is_start_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019); statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale_D = cast(jax.Array, self.param("scale", init, (x_BLD.shape[-1],), jnp.float32))
        x32_BLD = x_BLD.astype(jnp.float32)
        mean_square = jnp.mean(x32_BLD * x32_BLD, axis=-1, keepdims=True)
        return (x32_BLD * jax.lax.rsqrt(mean_square + self.eps) * scale_D[None, None]).astype(
            x_BLD.dtype
        )


def rope_frequencies(width: int, base: float, yarn: YarnConfig | None) -> np.ndarray:
    """Radians per position of each pair, base^(-2d/C), stretched by YaRN; float32 [C/2]."""
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if yarn is not None:
        turns = yarn.original_length * frequency / (2 * np.pi)
        kept = np.clip((turns - yarn.beta_slow) / (yarn.beta_fast - yarn.beta_slow), 0.0, 1.0)
        frequency *= kept + (1 - kept) / yarn.factor
    return frequency.astype(np.float32)


def rope(
    x_BLHC: jax.Array, positions_BL: jax.Array, base: float, yarn: YarnConfig | None = None
) -> jax.Array:
    """Turns each pair (x[d], x[d + C/2]) by position * base^(-2d/C) (RoFormer, 2021; half-split).

    Args:
      x_BLHC: float [B, L, H, C], C even.
      positions_BL: int32 [B, L].
    Returns:
      [B, L, H, C] in x's dtype; angles and rotation in float32.
    """
    frequency_C = jnp.asarray(rope_frequencies(x_BLHC.shape[-1], base, yarn))
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHC.dtype)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (Shazeer 2020): a dense layer, and the shared experts."""

    config: DenseConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        d_model, d_ff, dtype = x_BLD.shape[-1], self.config.d_ff, x_BLD.dtype
        w_gate_up_D2F = weight(
            self, "gate_up", (d_model, 2, d_ff), ("embed", None, "mlp"), d_model**-0.5
        )
        w_down_FD = weight(self, "down", (d_ff, d_model), ("mlp", "embed"), self.out_stddev)
        h_BL2F = jnp.einsum("BLD,DiF->BLiF", x_BLD, w_gate_up_D2F.astype(dtype))
        h_BLF = jax.nn.silu(h_BL2F[:, :, 0]) * h_BL2F[:, :, 1]
        return jnp.einsum("BLF,FD->BLD", h_BLF, w_down_FD.astype(dtype))
