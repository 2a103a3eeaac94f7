"""Rows of 8 bits with a scale for each block of channels: what fp8 tensor cores multiply.

T rows, D channels, S blocks of channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.quantize import FORMATS

BLOCK_SIZE = 128
"""Channels that share a scale (DeepSeek-V3, 2024, section 3.3.1)."""


class ScaledRows(NamedTuple):
    """x[t, d] = values[t, d] * scales[t, d // 128]."""

    values: jax.Array
    """float8_e4m3fn [T, D]."""
    scales: jax.Array
    """float32 [T, S]."""


def scale_rows(x_TD: jax.Array) -> ScaledRows:
    """Returns x rounded to e4m3, its blocks scaled so that the largest magnitude becomes 448.

    Raises:
      ValueError: 128 does not divide D.
    Numerics: an entry is off by at most max(|x| / 16, scale / 1024).
    """
    num_rows, width = x_TD.shape
    if width % BLOCK_SIZE:
        raise ValueError(f"rows of {width} channels can't be scaled in blocks of {BLOCK_SIZE}")
    spec = FORMATS["fp8_e4m3"]
    x_TSZ = x_TD.astype(jnp.float32).reshape(num_rows, -1, BLOCK_SIZE)
    scales_TS = jnp.abs(x_TSZ).max(axis=-1) / spec.largest
    ratio_TSZ = x_TSZ / jnp.where(scales_TS > 0, scales_TS, 1.0)[..., None]
    clipped_TSZ = jnp.clip(ratio_TSZ, -spec.largest, spec.largest)  # beyond 448 there is only NaN
    return ScaledRows(clipped_TSZ.astype(spec.dtype).reshape(num_rows, width), scales_TS)


def unscale_rows(rows: ScaledRows) -> jax.Array:
    """The numbers that the rows stand for, float32 [T, D]."""
    scales_TD = jnp.repeat(rows.scales, BLOCK_SIZE, axis=1)
    return rows.values.astype(jnp.float32) * scales_TD
