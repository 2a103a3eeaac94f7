"""Rounding weights to few bits and back.

K inputs, N outputs, S blocks of Z inputs (block_size).
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kernels.quantize.packing import pack, unpack, unpack_scales
from kernels.quantize.qtensor import FORMATS, Format, QTensor


def quantize(
    w_KN: jax.Array, format: Format, *, block_size: int = 128, scale_dtype: str = "float32"
) -> QTensor:
    """Returns w rounded to the nearest value that the format holds, in canonical order.

    A block's scale takes its largest magnitude to the format's largest value (symmetric, no zero
    point); blocks lie along the inputs, which a product sums over (reference/methods.md D1).

    Args:
      w_KN: float [..., K, N].
      block_size: inputs that share a scale; must divide K. bf16 has no scales.
      scale_dtype: float32, or bfloat16 (rounded up, so that no weight is clipped by it).
    Raises:
      ValueError: an unknown format or scale dtype, a block_size that does not divide K, or, where
        w's values are known, some that are not finite.
    Numerics: |w - dequantize(q)| <= scale / 2 for int8 and int4; for fp8_e4m3 at most
      max(|w| / 16, scale / 1024); an all-zero block stays zero.
    """
    _check(w_KN, format, block_size, scale_dtype)
    spec = FORMATS[format]
    w_NK = jnp.swapaxes(w_KN.astype(jnp.float32), -1, -2)
    if format == "bf16":
        *leading, num_outputs, _ = w_NK.shape
        return QTensor(
            w_NK.astype(spec.dtype), jnp.zeros((*leading, 0, num_outputs), scale_dtype), format, 0
        )
    w_NSZ = w_NK.reshape(*w_NK.shape[:-1], -1, block_size)
    scale_NS1 = _round_up(jnp.abs(w_NSZ).max(axis=-1, keepdims=True) / spec.largest, scale_dtype)
    ratio_NSZ = w_NSZ / jnp.where(scale_NS1 > 0, scale_NS1, 1.0).astype(jnp.float32)
    # Clipped before the cast: beyond 448, e4m3 has only NaN.
    ratio_NK = jnp.clip(ratio_NSZ, -spec.largest, spec.largest).reshape(w_NK.shape)
    if format == "fp8_e4m3":
        values = ratio_NK.astype(spec.dtype)
    else:
        values = pack(jnp.round(ratio_NK).astype(jnp.int8), spec.bits, "canonical")
    return QTensor(values, jnp.swapaxes(scale_NS1[..., 0], -1, -2), format, block_size)


def dequantize(weight: QTensor, dtype: str = "float32") -> jax.Array:
    """The weights that a QTensor stands for, [..., K, N]: the definition of correct."""
    values = weight.values
    if weight.format in ("int8", "int4"):
        values = unpack(values, weight.bits, weight.packing)
    w_NK = values.astype(jnp.float32)
    if weight.format != "bf16":
        scale_SN = unpack_scales(weight.scales.astype(jnp.float32), weight.packing)
        scale_NS = jnp.swapaxes(scale_SN, -1, -2)
        w_NK *= jnp.repeat(scale_NS, weight.block_size, axis=-1)
    return jnp.swapaxes(w_NK, -1, -2).astype(dtype)


def _round_up(scale: jax.Array, dtype: str) -> jax.Array:
    """scale in the dtype, never below what it was."""
    rounded = scale.astype(dtype)
    is_below = rounded.astype(jnp.float32) < scale
    return jnp.where(is_below, jnp.nextafter(rounded, jnp.full_like(rounded, jnp.inf)), rounded)


def _check(w_KN: jax.Array, format: Format, block_size: int, scale_dtype: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} must be one of {sorted(FORMATS)}")
    if scale_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"scale_dtype {scale_dtype!r} must be float32 or bfloat16")
    if w_KN.ndim < 2:
        raise ValueError(f"a weight of shape {w_KN.shape} must be [..., inputs, outputs]")
    if format != "bf16" and (block_size < 1 or w_KN.shape[-2] % block_size):
        raise ValueError(
            f"block_size={block_size} must divide the {w_KN.shape[-2]} inputs of w {w_KN.shape}"
        )
    if format == "int4" and w_KN.shape[-2] % 2:
        raise ValueError(f"int4 packs inputs in pairs, w {w_KN.shape} has {w_KN.shape[-2]} inputs")
    if not isinstance(w_KN, Tracer):
        wrong = int((~jnp.isfinite(w_KN)).sum())
        if wrong:
            raise ValueError(f"{wrong} of {w_KN.size} weights are not finite: nothing to round to")
