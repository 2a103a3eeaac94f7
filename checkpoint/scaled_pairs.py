"""Weights of 4 and 8 bits with scales beside them, as modelopt and compressed-tensors name them.

    modelopt             NAME (uint8, pairs of E2M1), NAME_scale [N, K/16] in float8 and
                         NAME_scale_2, one number (NVFP4); or NAME (float8) and NAME_scale, one
                         number, or a power of two of each 32 (uint8: MXFP8)
    compressed-tensors   NAME_packed (uint8), NAME_scale, and NAME_global_scale, which divides

N outputs, K inputs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from configs.checks import require
from formats.block_floats import E8M0, FP8
from formats.safetensors.header import TensorInfo, quote

PACKED, SCALE, FACTOR, DIVISOR = "_packed", "_scale", "_scale_2", "_global_scale"
ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale")
"""Ends of what only engines read that round activations, keys and values too."""
U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


class ScaledPair(NamedTuple):
    """A weight's parts."""

    shape: tuple[int, ...]
    """Of the weight, [N, K]."""
    values: TensorInfo
    """float8 [N, K], or pairs of E2M1 in uint8 or int8 [N, K/2], the first in the low half."""
    scales: TensorInfo
    """[N, blocks], or one number."""
    factor: TensorInfo | None
    """One number that all scales are multiplied by, or divided where its name ends so."""

    @property
    def divides(self) -> bool:
        return self.factor is not None and self.factor.name.endswith(DIVISOR)


def packed_pair(
    info: TensorInfo,
    stem: str,
    tensors: Mapping[str, TensorInfo],
    factor: str,
    scale: str | None = None,
) -> ScaledPair:
    """The parts of a weight of 4 bits.

    Args:
      stem: the weight's own name.
      factor: what its factor's name ends with.
      scale: the name of its scales, where it is not the usual one.
    Raises:
      UserError: scales that are missing, or of other blocks.
    """
    scale = scale or stem + SCALE
    scales, one = tensors.get(scale), tensors.get(stem + factor)
    shape = tuple(size * part for size, part in zip(info.shape, (1, 2), strict=False))
    is_right = (
        scales is not None
        and len(info.shape) == len(scales.shape) == len(shape) == 2
        and scales.shape[0] == shape[0]
        and scales.shape[1] > 0
        and shape[1] % scales.shape[1] == 0
        and scales.dtype in ((FP8,) if one is not None else (U8, E8M0))
        and (one is None or (_is_one(one) and one.dtype in _FLOATS))
    )
    require(
        is_right,
        f"{info.file}: {quote(info.name)} of 4 bits, {list(info.shape)}, needs "
        f"{quote(scale)} [rows, blocks] in F8_E4M3 with one number {quote(stem + factor)}, "
        "or in powers of two: get the files again, or the checkpoint in bfloat16",
    )
    assert scales is not None
    return ScaledPair(shape, info, scales, one)


def float8_pair(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> ScaledPair:
    """The parts of a float8 weight of modelopt.

    Raises:
      UserError: scales that are missing, or of other blocks.
    """
    scales, shape = tensors.get(info.name + SCALE), info.shape
    is_right = scales is not None and len(shape) == 2
    require(
        scales is not None and is_right and (_is_one(scales) or _has_powers_of_32(scales, shape)),
        f"{info.file}: {quote(info.name)}, float8 {list(shape)}, needs {quote(info.name + SCALE)}: "
        "one number, or a power of two of each 32 inputs: get the checkpoint in bfloat16",
    )
    assert scales is not None
    return ScaledPair(shape, info, scales, None)


def _has_powers_of_32(scales: TensorInfo, shape: tuple[int, ...]) -> bool:
    needed = (shape[0], shape[1] // 32)
    return scales.dtype in (U8, E8M0) and scales.shape == needed and shape[1] % 32 == 0


def _is_one(info: TensorInfo) -> bool:
    return info.shape in ((), (1,))


def float_scales(scales: np.ndarray, factor: np.ndarray | None, *, divides: bool) -> np.ndarray:
    """Scales as float32: powers of two in uint8 as what they stand for, times the factor."""
    wide = (scales.view(E8M0) if scales.dtype == U8 else scales).astype(np.float32)
    if factor is None:
        return wide
    one = factor.reshape(()).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return wide / one if divides else wide * one
