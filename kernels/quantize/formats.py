"""The formats of weights by the names that users know, and what each target's kernels need.

K inputs, N outputs.
"""

import math
from typing import Literal

import jax

from kernels import native
from kernels.backend import Target, prefers_mosaic, runs_mosaic, runs_triton
from kernels.quantize.api import MATRIX, quantize
from kernels.quantize.native import quantize_panels
from kernels.quantize.packing import PANEL_OUTPUTS, repack
from kernels.quantize.qtensor import Format, MatrixDims, Packing, QTensor

WeightFormat = Literal["float32", "bfloat16", "fp8", "int8", "int4", "int4_affine"]
QUANTIZED: dict[WeightFormat, Format] = {
    "fp8": "fp8_e4m3",
    "int8": "int8",
    "int4": "int4",
    "int4_affine": "int4",
}
"""Those whose weights are QTensors; the other two are plain arrays."""
AFFINE: tuple[WeightFormat, ...] = ("int4_affine",)
"""Those whose blocks have an offset."""
FOUR_BITS: tuple[WeightFormat, ...] = ("int4", "int4_affine")

CPU_BLOCK, GPU_BLOCK = 32, 128
"""Inputs that share a scale: as llama.cpp's Q8_0 and Q4_0 have it, and what a step of a GPU's
kernel multiplies at a time."""
MOSAIC_OUTPUTS = 64
"""Outputs that the Mosaic kernel writes at a time."""


def preferred_packing(format: Format, target: Target) -> Packing:
    """The order in which the target's fastest kernel reads weights of the format."""
    if target.platform == "cpu" and native.is_available():
        return "panels"
    if format == "int4" and runs_triton(target) and not _prefers_mosaic(format, target):
        return "split_128"
    return "canonical"


def rounds_in_place(format: Format, target: Target) -> bool:
    """Whether `to_format` takes no memory beside a weight and its result."""
    return preferred_packing(format, target) == "panels"


def default_block_size(format: Format, target: Target) -> int:
    """Inputs that share a scale where their number allows it."""
    del format  # all have the same so far
    return GPU_BLOCK if runs_triton(target) else CPU_BLOCK


def scale_dtype(target: Target) -> str:
    """In blocks of 32, scales of 32 bits would be a fifth of an int4 weight's bytes."""
    return "float32" if runs_triton(target) else "bfloat16"


def choose_block_size(num_inputs: int, format: Format, target: Target) -> int | None:
    """default_block_size, or where it does not divide the inputs the largest half of it, half of
    that, ... that does and that the target's kernels can read; None: there is none.
    """
    block_size, least = default_block_size(format, target), _least_block(format, target)
    while num_inputs % block_size:
        block_size //= 2
    return block_size if block_size >= least else None


def quantizable_reason(
    shape: tuple[int, ...], format: Format, target: Target, *, dims: MatrixDims = MATRIX
) -> str | None:
    """Why weights of this shape can't have this format on this target; None: they can.

    Such a weight stays in floats; which else do (small ones) is the caller's choice.
    """
    _, inputs, outputs = dims.split(shape)
    num_inputs, num_outputs = math.prod(inputs), math.prod(outputs)
    if choose_block_size(num_inputs, format, target) is None:
        return (
            f"{format} needs blocks of at least {_least_block(format, target)} inputs on "
            f"{target.platform}, which do not divide the {num_inputs} inputs of a weight {shape}"
        )
    multiple = _multiple_of_outputs(format, target)
    if num_outputs % multiple:
        return (
            f"{format} needs a multiple of {multiple} outputs on {target.platform}, and a weight "
            f"{shape} has {num_outputs}"
        )
    return None


def to_format(
    w: jax.Array, format: WeightFormat, target: Target, *, dims: MatrixDims = MATRIX
) -> jax.Array | QTensor:
    """w as the target's kernels read it best in a format: an array, or a packed QTensor.

    Raises:
      ValueError: quantizable_reason, or `quantize`'s.
    """
    if format not in QUANTIZED:
        return w.astype(format)
    quantized = QUANTIZED[format]
    reason = quantizable_reason(w.shape, quantized, target, dims=dims)
    if reason is not None:
        raise ValueError(f"{reason}: leave it in float32 or bfloat16")
    block_size = choose_block_size(math.prod(dims.split(w.shape)[1]), quantized, target)
    assert block_size is not None
    packing = preferred_packing(quantized, target)
    is_panels = packing == "panels"
    rounded = (quantize_panels if is_panels else quantize)(
        w.astype("float32") if is_panels else w,
        quantized,
        dims=dims,
        block_size=block_size,
        scale_dtype=scale_dtype(target),
        is_affine=format in AFFINE,
    )
    return repack(rounded, packing)


def _prefers_mosaic(format: Format, target: Target) -> bool:
    return runs_mosaic(target) and prefers_mosaic(f"grouped_matmul/{format}", target)


def _least_block(format: Format, target: Target) -> int:
    """Inputs of the smallest block that the kernels read."""
    if runs_triton(target):
        return GPU_BLOCK if format == "int4" else 16
    return 8 if preferred_packing(format, target) == "panels" else 2


def _multiple_of_outputs(format: Format, target: Target) -> int:
    if preferred_packing(format, target) == "panels":
        return PANEL_OUTPUTS
    # Triton reads int8 and fp8 in Mosaic's order, too: only of int4 it needs another.
    return MOSAIC_OUTPUTS if format == "int4" and _prefers_mosaic(format, target) else 1
