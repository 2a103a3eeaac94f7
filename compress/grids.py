"""Grids that weights are rounded to: codes of few bits with a scale for each block of inputs.

N outputs, K inputs, S blocks of Z inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from checkpoint.rounded import (
    BITS,
    SCALE_DTYPES,
    RoundedFormat,
    RoundedParameter,
    ScaleDtype,
    as_rows,
    from_rows,
)
from kernels.quantize import Format, MatrixDims
from kernels.quantize.api import AFFINE_STEPS, FOUND_AGAIN, STEPS

RANGES: dict[RoundedFormat, tuple[float, float]] = {
    "int8": (-127.0, 127.0),
    "int4": (-8.0, 7.0),
    "fp8": (-448.0, 448.0),
}
CLIPPING_STEPS = (8.0, 7.0, 7.5, 8.5, 9.0, 9.5, 10.0, 10.7)
AFFINE_CLIPPING_STEPS = tuple(15 / share for share in (1.0, 0.96, 0.92, 0.88, 0.84, 0.8))
"""What four bits are tried with where it is known what each input's error counts: then finer steps
pay for clipping a block's largest weights."""
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Grid:
    """Codes and how many inputs share a scale."""

    format: RoundedFormat
    block: int
    """0: all inputs of an output."""
    scale_dtype: ScaleDtype
    is_affine: bool = False
    """int4 only: codes from 0 to 15 and an offset, as llama.cpp's Q4_1."""

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest code."""
        return (0.0, 15.0) if self.is_affine else RANGES[self.format]

    def fits(self, num_inputs: int) -> bool:
        """Whether the blocks divide an output's inputs."""
        return num_inputs % (self.block or num_inputs) == 0 and num_inputs % 2 == 0

    def bits_per_weight(self, num_inputs: int) -> float:
        """Scales and offsets included."""
        steps = SCALE_DTYPES[self.scale_dtype].itemsize * 8 * (2 if self.is_affine else 1)
        return BITS[self.format] + steps / (self.block or num_inputs)

    def __str__(self) -> str:
        block = f" of {self.block}" if self.block else " of a row"
        return f"{self.format}{' with offsets' if self.is_affine else ''} in blocks{block}"


@dataclass(frozen=True)
class Steps:
    """Scales, and offsets of an affine grid; float32 [N, S], values of the scale dtype."""

    scales_NS: np.ndarray
    offsets_NS: np.ndarray | None = None

    def column(self, k: int, block: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Those of one input, [N]."""
        s = k // block
        return self.scales_NS[:, s], None if self.offsets_NS is None else self.offsets_NS[:, s]


def choose_steps(w_NK: np.ndarray, grid: Grid, importance_K: np.ndarray | None = None) -> Steps:
    """The steps of a few tried that round each block best.

    Of four bits without importance the first are taken, which clip nothing, unless others round a
    block so much better as FOUND_AGAIN says.

    Args:
      w_NK: float32.
      importance_K: what the square of each input's error counts; None: nobody knows.
    """
    block = grid.block or w_NK.shape[1]
    w_NSZ = w_NK.reshape(len(w_NK), -1, block)
    weight_SZ = np.ones(w_NSZ.shape[1:], np.float32)
    if importance_K is not None:
        weight_SZ = importance_K.astype(np.float32).reshape(weight_SZ.shape)
        weight_SZ = weight_SZ + 1e-6 * max(float(weight_SZ.mean()), 1e-30)
    best: Steps | None = None
    least_NS: np.ndarray | None = None
    margin = FOUND_AGAIN[_kernel_format(grid)] if importance_K is None else 1.0
    for tried in _candidates(w_NSZ, grid, clips=importance_K is not None):
        rounded_NSZ = decode(encode_blocks(w_NSZ, tried, grid), tried)
        error_NS = (weight_SZ * (rounded_NSZ - w_NSZ) ** 2).sum(-1)
        if best is None or least_NS is None:
            best, least_NS = tried, error_NS / margin
            continue
        better_NS = error_NS < least_NS
        scales_NS = np.where(better_NS, tried.scales_NS, best.scales_NS)
        offsets_NS = None
        if tried.offsets_NS is not None and best.offsets_NS is not None:
            offsets_NS = np.where(better_NS, tried.offsets_NS, best.offsets_NS)
        best, least_NS = Steps(scales_NS, offsets_NS), np.minimum(error_NS, least_NS)
    assert best is not None
    return best


def _candidates(w_NSZ: np.ndarray, grid: Grid, *, clips: bool) -> Iterator[Steps]:
    four_bits = grid.format == "int4"
    if grid.is_affine:
        low_NS, span_NS = w_NSZ.min(-1), np.ptp(w_NSZ, -1)
        for step in AFFINE_CLIPPING_STEPS if clips else AFFINE_STEPS:
            clipped_NS = np.maximum(1 - 15 / step, 0) * span_NS / 2  # at both ends
            yield Steps(_in_dtype(span_NS / step, grid), _in_dtype(low_NS + clipped_NS, grid))
        return
    largest_NS = np.abs(w_NSZ).max(-1)
    flips_NS = np.where(four_bits & (w_NSZ.max(-1) == largest_NS), -1.0, 1.0)
    for step in CLIPPING_STEPS if four_bits and clips else STEPS[_kernel_format(grid)]:
        yield Steps(_in_dtype(flips_NS * largest_NS / step, grid))


def _kernel_format(grid: Grid) -> Format:
    return "fp8_e4m3" if grid.format == "fp8" else grid.format


def _in_dtype(x_NS: np.ndarray, grid: Grid) -> np.ndarray:
    return x_NS.astype(SCALE_DTYPES[grid.scale_dtype]).astype(np.float32)


def encode_blocks(w_NSZ: np.ndarray, steps: Steps, grid: Grid) -> np.ndarray:
    """The nearest codes, float32 [N, S, Z]; 0 where the scale is 0."""
    offsets = 0.0 if steps.offsets_NS is None else steps.offsets_NS[..., None]
    return nearest_codes(w_NSZ - offsets, steps.scales_NS[..., None], grid)


def nearest_codes(w: np.ndarray, scales: np.ndarray, grid: Grid) -> np.ndarray:
    """The codes nearest to w / scales, float32 of w's shape."""
    ratio = w / np.where(scales == 0, 1.0, scales)
    ratio = np.clip(np.where(scales == 0, 0.0, ratio), *grid.range)
    if grid.format == "fp8":
        return ratio.astype(FP8).astype(np.float32)
    return np.round(ratio)


def decode(codes_NSZ: np.ndarray, steps: Steps) -> np.ndarray:
    """Codes times scales plus offsets."""
    values = codes_NSZ * steps.scales_NS[..., None]
    return values if steps.offsets_NS is None else values + steps.offsets_NS[..., None]


def round_to_nearest(
    w_NK: np.ndarray, grid: Grid, importance_K: np.ndarray | None = None
) -> tuple[np.ndarray, Steps]:
    """Codes, float32 [N, K], and their steps."""
    steps = choose_steps(w_NK, grid, importance_K)
    block = grid.block or w_NK.shape[1]
    codes_NSZ = encode_blocks(w_NK.reshape(len(w_NK), -1, block), steps, grid)
    return codes_NSZ.reshape(w_NK.shape), steps


def decoded(codes_NK: np.ndarray, steps: Steps, grid: Grid) -> np.ndarray:
    """Weights of codes, float32 [N, K]."""
    block = grid.block or codes_NK.shape[1]
    return decode(codes_NK.reshape(len(codes_NK), -1, block), steps).reshape(codes_NK.shape)


def as_parameter(
    rows: list[tuple[np.ndarray, Steps]], shape: tuple[int, ...], dims: MatrixDims, grid: Grid
) -> RoundedParameter:
    """A parameter of codes and steps.

    Args:
      rows: of each matrix of its stack, in order.
    """
    stack = dims.split(shape)[0]
    codes = np.stack([codes_NK for codes_NK, _ in rows])
    scales = np.stack([steps.scales_NS for _, steps in rows])
    offsets = [steps.offsets_NS for _, steps in rows if steps.offsets_NS is not None]
    codes_NK = codes.reshape(*stack, *codes.shape[1:]).astype(
        FP8 if grid.format == "fp8" else np.int8
    )

    def stacked(steps_NS: np.ndarray) -> np.ndarray:
        return steps_NS.reshape(*stack, *steps_NS.shape[1:]).astype(np.float32)

    return RoundedParameter(
        format=grid.format,
        codes=np.ascontiguousarray(from_rows(codes_NK, shape, dims)),
        scales_NS=stacked(scales),
        offsets_NS=stacked(np.stack(offsets)) if offsets else None,
        dims=dims,
        scale_dtype=grid.scale_dtype,
    )


def matrices(w: np.ndarray, dims: MatrixDims) -> np.ndarray:
    """The matrices of a parameter, float32 [stack, N, K]."""
    rows = as_rows(np.asarray(w, np.float32), dims)
    return rows.reshape(-1, *rows.shape[-2:])
