"""Parameters that were rounded on purpose: their codes and scales, for a file that keeps both.

A format in a file would round a dequantised weight again, with scales of its own; these are written
as they are. K inputs, N outputs, S blocks of inputs; codes have the parameter's own dims.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from checkpoint.weight_map import Place, place_index
from kernels.quantize import MatrixDims

RoundedFormat = Literal["int8", "int4", "fp8"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
BITS: dict[RoundedFormat, int] = {"int8": 8, "int4": 4, "fp8": 8}
SCALE_DTYPES: dict[ScaleDtype, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def as_rows(w: np.ndarray, dims: MatrixDims) -> np.ndarray:
    """A weight as [..., N, K]: an output's inputs lie together."""
    stack, inputs, outputs = dims.split(w.shape)
    if dims.outputs_first:
        return w.reshape(*stack, math.prod(outputs), math.prod(inputs))
    return w.reshape(*stack, math.prod(inputs), math.prod(outputs)).swapaxes(-1, -2)


def from_rows(rows_NK: np.ndarray, shape: tuple[int, ...], dims: MatrixDims) -> np.ndarray:
    """The inverse of `as_rows`."""
    return (rows_NK if dims.outputs_first else rows_NK.swapaxes(-1, -2)).reshape(shape)


@dataclass(frozen=True)
class RoundedPart:
    """A part of a parameter, each array of the part's shape: w = code * scale + offset."""

    format: RoundedFormat
    block: int
    codes: np.ndarray
    """int8, or float8 of fp8; of int4 from -8 to 7, or 0 to 15 where there are offsets."""
    scales: np.ndarray
    """float32."""
    offsets: np.ndarray | None


@dataclass(frozen=True, eq=False)
class RoundedParameter:
    """One parameter in codes; stands where its array would (checkpoint.assemble.part_of)."""

    format: RoundedFormat
    codes: np.ndarray
    """Of the parameter's shape: see RoundedPart."""
    scales_NS: np.ndarray
    """float32 [..., N, S], each a value of scale_dtype."""
    offsets_NS: np.ndarray | None
    """The same of what is added; None where nothing is."""
    dims: MatrixDims
    scale_dtype: ScaleDtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return as_rows(self.codes, self.dims).shape[-1] // self.scales_NS.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Of codes, scales and offsets."""
        scale = SCALE_DTYPES[self.scale_dtype].itemsize
        count = self.scales_NS.size * (1 if self.offsets_NS is None else 2)
        return self.codes.size * BITS[self.format] // 8 + scale * count

    def values(self) -> np.ndarray:
        """The weights, float32."""
        return self.part((None,) * self.codes.ndim)

    def part(self, place: Place) -> np.ndarray:
        """What lies at an entry's place, float32."""
        found = self.rounded(place)
        values = found.codes.astype(np.float32) * found.scales
        return values if found.offsets is None else values + found.offsets

    def rounded(self, place: Place) -> RoundedPart:
        """As `part`, in codes."""
        index = place_index(place)
        spread = [self._spread(x)[index] if x is not None else None for x in self._steps()]
        assert spread[0] is not None
        return RoundedPart(self.format, self.block, self.codes[index], spread[0], spread[1])

    def _steps(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self.scales_NS, self.offsets_NS

    def _spread(self, steps_NS: np.ndarray) -> np.ndarray:
        """Scales of the parameter's shape."""
        return from_rows(np.repeat(steps_NS, self.block, axis=-1), self.shape, self.dims)


@dataclass(frozen=True, eq=False)
class StackedParameters:
    """Layers' parameters of one name, each an array or a RoundedParameter, as the stack of them."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def part(self, place: Place) -> np.ndarray:
        """What lies at an entry's place, float32."""
        if not isinstance(place[0], int):
            chosen = self.parts[place_index(place)[0]]
            return np.stack([_part(x, place[1:]) for x in chosen])
        return _part(self.parts[place[0]], place[1:])


def _part(leaf: Any, place: Place) -> np.ndarray:
    if isinstance(leaf, RoundedParameter):
        return leaf.part(place)
    return np.asarray(leaf)[place_index(place)]


def rounded_at(leaf: Any, place: Place) -> RoundedPart | None:
    """The codes at a parameter's place; None where it was not rounded."""
    if isinstance(leaf, StackedParameters) and isinstance(place[0], int):
        return rounded_at(leaf.parts[place[0]], place[1:])
    return leaf.rounded(place) if isinstance(leaf, RoundedParameter) else None


def rounded_leaf(leaf: Any, place: Place) -> RoundedParameter | None:
    """The rounded parameter at a place, or which it is a part of; None where there is none."""
    if isinstance(leaf, StackedParameters) and isinstance(place[0], int):
        return rounded_leaf(leaf.parts[place[0]], place[1:])
    return leaf if isinstance(leaf, RoundedParameter) else None


def stacked(leaves: Sequence[Any]) -> Any:
    """Layers' parameters of one name as one."""
    if any(isinstance(leaf, RoundedParameter) for leaf in leaves):
        return StackedParameters(tuple(leaves))
    return np.stack(leaves)
