"""Rounding into panels by the native CPU kernels, without a temporary of the weight's size."""

import math

import jax
import numpy as np

from kernels import native
from kernels.quantize.api import AFFINE_STEPS, FOUND_AGAIN, MATRIX, STEPS, check
from kernels.quantize.packing import PANEL_OUTPUTS
from kernels.quantize.qtensor import FORMATS, Format, MatrixDims, QTensor


def quantize_panels(
    w: jax.Array,
    format: Format,
    *,
    dims: MatrixDims = MATRIX,
    block_size: int,
    scale_dtype: str,
    is_affine: bool = False,
) -> QTensor:
    """Returns `repack(quantize(w, ...), "panels")`, but for blocks that two of the scales tried
    round equally well, within rounding: there it may be the other one.

    Args:
      w: float32, its values finite.
      block_size: a multiple of 8, at most 128.
    Raises:
      ValueError: as `quantize`.
    """
    check(w, format, dims, block_size, scale_dtype, is_affine)
    spec = FORMATS[format]
    stack, inputs, outputs = dims.split(w.shape)
    num_inputs, num_outputs = math.prod(inputs), math.prod(outputs)
    matrix = (num_outputs, num_inputs) if dims.outputs_first else (num_inputs, num_outputs)
    panels = (num_outputs // PANEL_OUTPUTS, num_inputs // block_size, PANEL_OUTPUTS)
    count = math.prod(stack)
    shapes = (
        jax.ShapeDtypeStruct((count, num_outputs, num_inputs * spec.bits // 8), spec.dtype),
        jax.ShapeDtypeStruct((count, *panels), scale_dtype),
        jax.ShapeDtypeStruct((count, *panels) if is_affine else (0,), scale_dtype),
    )
    values, scales, offsets = native.call(
        "moesaic_quantize",
        shapes,
        w.reshape(count, *matrix),
        largest=np.float32(spec.largest),
        least=np.float32(spec.least),
        found_again=np.float32(FOUND_AGAIN[format]),
        outputs_first=dims.outputs_first,
        steps=np.array(AFFINE_STEPS if is_affine else STEPS[format], np.float32),
    )
    return QTensor(
        values.reshape(*stack, *values.shape[1:]),
        scales.reshape(*stack, *panels),
        format,
        block_size,
        "panels",
        inputs,
        outputs,
        dims.outputs_first,
        offsets.reshape(*stack, *panels) if is_affine else None,
    )
