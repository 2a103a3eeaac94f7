"""Rounding weights to few bits and back.

K inputs, N outputs, S blocks of Z inputs (block_size).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kernels.quantize.packing import PANEL_OUTPUTS, pack, unpack, unpack_output, unpack_scales
from kernels.quantize.qtensor import FORMATS, Format, MatrixDims, QTensor

MATRIX = MatrixDims()
STEPS: dict[Format, tuple[float, ...]] = {
    "fp8_e4m3": (448.0,),
    "int8": (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0),
    "int4": (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
}
"""A scale is a block's largest magnitude over one of these: the first, unless another rounds the
block so much better as FOUND_AGAIN says. Of int4, 8 has all sixteen codes, and less finds again
what was rounded to some of them, by whatever method. None clips a block's largest weights for finer
steps: squared errors are less so, and models worse (docs/experiments.md)."""
AFFINE_STEPS = tuple(float(step) for step in range(15, 3, -1))
"""Likewise of an affine grid, over a block's span."""
FOUND_AGAIN: dict[Format, float] = {"fp8_e4m3": 1.0, "int8": 1.0, "int4": 64.0}
"""How many times as small the squared error is by which another scale than the first is taken. Of
four bits only weights that lie on its grid, but for a scale of 8 bits, are so much nearer."""


def quantize(
    w: jax.Array,
    format: Format,
    *,
    dims: MatrixDims = MATRIX,
    block_size: int = 128,
    scale_dtype: str = "float32",
    is_affine: bool = False,
) -> QTensor:
    """Returns w rounded to the nearest value that the format holds, in canonical order.

    A block's scale takes its largest magnitude to the format's largest value or, of int8 and int4,
    less (STEPS), where its squared error is less. Without offsets int4's scale is negative where
    the largest weight is positive, so that this one becomes -8. An affine grid goes from a block's
    least weight to its largest. Blocks lie along the inputs, which a product sums over
    (reference/methods.md D1).

    Args:
      w: float, its last dimensions those of one matrix.
      dims: which they are; the default is [..., K, N].
      block_size: inputs that share a scale; must divide K, the product of the inputs' dimensions.
      scale_dtype: float32, or bfloat16 (rounded up, so that no weight is clipped by it; of an
        affine grid, whose middle stays where it is, to the nearest).
      is_affine: of int4: whether blocks have an offset, too, as llama.cpp's Q4_1 and Q4_K. Weights
        that were rounded to such blocks, or without an offset, are found again, but for what the
        scale's dtype does to scales and offsets.
    Raises:
      ValueError: an unknown format or scale dtype, an affine grid of another format than int4, a
        block_size that does not divide K, or, where w's values are known, some that are not finite.
    Numerics: |w - dequantize(q)| <= scale / 2 for int8; for fp8_e4m3 at most max(|w| / 16, scale /
      1024); for int4 it is at most |scale|, affine |scale| / 2 (with a scale in bfloat16 a 32nd
      more, and a 256th of the offset); an all-zero block stays zero.
    """
    check(w, format, dims, block_size, scale_dtype, is_affine)
    return _rounded(w, format, dims, block_size, scale_dtype, is_affine)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _rounded(
    w: jax.Array,
    format: Format,
    dims: MatrixDims,
    block_size: int,
    scale_dtype: str,
    is_affine: bool,
) -> QTensor:
    """`quantize` without its checks, as one program."""
    spec = FORMATS[format]
    stack, inputs, outputs = dims.split(w.shape)
    w_NK = _outputs_first(w.astype(jnp.float32), stack, inputs, outputs, dims)
    w_NSZ = w_NK.reshape(*w_NK.shape[:-1], -1, block_size)
    offset_NS1 = None
    if is_affine:
        scale_NS1, offset_NS1 = _best_affine(w_NSZ, format, scale_dtype)
        w_NSZ = w_NSZ - offset_NS1.astype(jnp.float32)
    else:
        scale_NS1 = _best_scales(w_NSZ, format, scale_dtype)
    # Clipped before the cast: beyond 448, e4m3 has only NaN.
    ratio_NK = jnp.clip(_ratio(w_NSZ, scale_NS1), spec.least, spec.largest).reshape(w_NK.shape)
    if format == "fp8_e4m3":
        values = ratio_NK.astype(spec.dtype)
    else:
        values = pack(jnp.round(ratio_NK).astype(jnp.int8), spec.bits, "canonical")
    scales_SN, offsets_SN = (
        None if x_NS1 is None else jnp.swapaxes(x_NS1[..., 0], -1, -2)
        for x_NS1 in (scale_NS1, offset_NS1)
    )
    assert scales_SN is not None
    first = dims.outputs_first
    return QTensor(
        values, scales_SN, format, block_size, "canonical", inputs, outputs, first, offsets_SN
    )


def dequantize(weight: QTensor, dtype: str = "float32") -> jax.Array:
    """The weights that a QTensor stands for, of its shape: the definition of correct."""
    stored = unpack(weight.values, weight.bits, weight.packing)

    def of_inputs(x: jax.Array) -> jax.Array:
        x_SN = unpack_scales(x.astype(jnp.float32), weight.packing)
        return jnp.repeat(jnp.swapaxes(x_SN, -1, -2), weight.block_size, axis=-1)

    w_NK = stored.astype(jnp.float32) * of_inputs(weight.scales)
    if weight.offsets is not None:
        w_NK += of_inputs(weight.offsets)
    w = w_NK if weight.outputs_first else jnp.swapaxes(w_NK, -1, -2)
    return w.reshape(weight.shape).astype(dtype)


@jax.jit
def _num_not_finite(w: jax.Array) -> jax.Array:
    return (~jnp.isfinite(w)).sum()


def take_outputs(weight: QTensor, ids: jax.Array, dtype: str = "float32") -> jax.Array:
    """The weights of some outputs, [*ids.shape, *inputs]: rows of an embedding table.

    Args:
      weight: one matrix, without a stack.
      ids: int32, each in [0, N).
    """
    assert not weight.stack
    num_inputs, num_outputs = weight.matrix_shape
    values, is_panels = weight.values, weight.packing == "panels"
    panel, place = ids // PANEL_OUTPUTS, ids % PANEL_OUTPUTS
    if is_panels:
        panels = values.reshape(num_outputs // PANEL_OUTPUTS, -1, PANEL_OUTPUTS, 4)
        of_ids = panels[panel, :, place]
    else:
        of_ids = values[ids]

    def of_inputs(x: jax.Array) -> jax.Array:
        x_S = x[panel, :, place] if is_panels else jnp.moveaxis(x, -1, 0)[ids]
        return jnp.repeat(x_S.astype(jnp.float32), weight.block_size, axis=-1)

    stored = unpack_output(of_ids.reshape(*ids.shape, -1), weight.bits, weight.packing)
    w_K = stored.astype(jnp.float32) * of_inputs(weight.scales)
    if weight.offsets is not None:
        w_K += of_inputs(weight.offsets)
    return w_K.reshape(*ids.shape, *(weight.inputs or (num_inputs,))).astype(dtype)


def _outputs_first(
    w: jax.Array,
    stack: tuple[int, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    dims: MatrixDims,
) -> jax.Array:
    """w as [..., N, K]."""
    num_inputs, num_outputs = math.prod(inputs), math.prod(outputs)
    if dims.outputs_first:
        return w.reshape(*stack, num_outputs, num_inputs)
    return jnp.swapaxes(w.reshape(*stack, num_inputs, num_outputs), -1, -2)


def _ratio(w_NSZ: jax.Array, scale_NS1: jax.Array) -> jax.Array:
    return w_NSZ / jnp.where(scale_NS1 != 0, scale_NS1, 1.0).astype(jnp.float32)


def _best_scales(w_NSZ: jax.Array, format: Format, dtype: str) -> jax.Array:
    """The scale of STEPS that rounds each block best, [..., N, S, 1]."""
    spec, steps = FORMATS[format], STEPS[format]
    largest_NS1 = jnp.abs(w_NSZ).max(axis=-1, keepdims=True)
    if len(steps) == 1:
        return _round_up(largest_NS1 / steps[0], dtype)
    is_signed = -spec.least > spec.largest
    is_flipped_NS1 = is_signed & (w_NSZ.max(axis=-1, keepdims=True) == largest_NS1)

    def try_step(best: tuple[jax.Array, jax.Array], step: jax.Array) -> Any:
        best_NS1, least_NS1 = best
        up_NS1 = _round_up(largest_NS1 / step, dtype)
        scale_NS1 = jnp.where(is_flipped_NS1, -up_NS1, up_NS1)
        ratio_NSZ = _ratio(w_NSZ, scale_NS1)
        off_NSZ = jnp.clip(jnp.round(ratio_NSZ), spec.least, spec.largest) - ratio_NSZ
        # In units of the block's largest weight, whose square may be no float32.
        error_NS1 = jnp.square(off_NSZ / step).sum(axis=-1, keepdims=True)
        is_better_NS1 = error_NS1 < least_NS1
        best_NS1 = jnp.where(is_better_NS1, scale_NS1, best_NS1)
        return (best_NS1, _to_beat(step == steps[0], format, error_NS1, least_NS1)), None

    none = jnp.zeros_like(largest_NS1, dtype), jnp.full_like(largest_NS1, jnp.inf)
    # One after the other: side by side they would take eight times the weight's memory.
    (best_NS1, _), _ = jax.lax.scan(try_step, none, jnp.asarray(steps, jnp.float32))
    return best_NS1


def _to_beat(
    is_first: jax.Array, format: Format, error_NS1: jax.Array, least_NS1: jax.Array
) -> jax.Array:
    """The error below which the next scale is taken."""
    return jnp.where(is_first, error_NS1 / FOUND_AGAIN[format], jnp.minimum(error_NS1, least_NS1))


def _best_affine(w_NSZ: jax.Array, format: Format, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The scale, and the offset of code 0, that round each block best, [..., N, S, 1]."""
    spec = FORMATS[format]
    highest_NS1, lowest_NS1 = (of(w_NSZ, axis=-1, keepdims=True) for of in (jnp.max, jnp.min))
    # Halves first: the sum of two weights may be no float32.
    middle_NS1 = 0.5 * highest_NS1 + 0.5 * lowest_NS1
    half_span_NS1 = 0.5 * highest_NS1 - 0.5 * lowest_NS1

    def try_step(best: tuple[jax.Array, jax.Array, jax.Array], step: jax.Array) -> Any:
        best_scale_NS1, best_offset_NS1, least_NS1 = best
        scale_NS1 = half_span_NS1 / (0.5 * step)
        offset_NS1 = middle_NS1 - (0.5 * step + spec.least) * scale_NS1
        ratio_NSZ = _ratio(w_NSZ - offset_NS1, scale_NS1)
        off_NSZ = jnp.clip(jnp.round(ratio_NSZ), spec.least, spec.largest) - ratio_NSZ
        # In units of the block's span, whose square may be no float32.
        error_NS1 = jnp.square(off_NSZ / step).sum(axis=-1, keepdims=True)
        is_better_NS1 = error_NS1 < least_NS1
        chosen = (
            jnp.where(is_better_NS1, tried, best)
            for tried, best in ((scale_NS1, best_scale_NS1), (offset_NS1, best_offset_NS1))
        )
        is_first = step == AFFINE_STEPS[0]
        return (*chosen, _to_beat(is_first, format, error_NS1, least_NS1)), None

    zero_NS1 = jnp.zeros_like(middle_NS1)
    none = zero_NS1, zero_NS1, jnp.full_like(middle_NS1, jnp.inf)
    # One after the other, as in _best_scales.
    best, _ = jax.lax.scan(try_step, none, jnp.asarray(AFFINE_STEPS, jnp.float32))
    return best[0].astype(dtype), best[1].astype(dtype)


def _round_up(scale: jax.Array, dtype: str) -> jax.Array:
    """scale in the dtype, never below what it was."""
    rounded = scale.astype(dtype)
    is_below = rounded.astype(jnp.float32) < scale
    return jnp.where(is_below, jnp.nextafter(rounded, jnp.full_like(rounded, jnp.inf)), rounded)


def check(
    w: jax.Array,
    format: Format,
    dims: MatrixDims,
    block_size: int,
    scale_dtype: str,
    is_affine: bool,
) -> None:
    """
    Raises:
      ValueError: as `quantize`.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} must be one of {sorted(FORMATS)}")
    if scale_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"scale_dtype {scale_dtype!r} must be float32 or bfloat16")
    if is_affine and format != "int4":
        raise ValueError(f"an affine grid is one of int4, not of {format}")
    num_inputs = math.prod(dims.split(w.shape)[1])
    if block_size < 1 or num_inputs % block_size:
        raise ValueError(
            f"block_size={block_size} must divide the {num_inputs} inputs of w {w.shape}"
        )
    if format == "int4" and num_inputs % 2:
        raise ValueError(f"int4 packs inputs in pairs, w {w.shape} has {num_inputs} inputs")
    if not isinstance(w, Tracer):
        wrong = int(_num_not_finite(w))
        if wrong:
            raise ValueError(f"{wrong} of {w.size} weights are not finite: nothing to round to")
