"""The QTensor: a weight, or a stack of them, in few bits with a scale for each block of inputs, and
where its grid is affine an offset.

K inputs, N outputs, S blocks of inputs (K / block_size). Leading dimensions (layers, experts) are
written "...".
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Format = Literal["fp8_e4m3", "int8", "int4"]
Packing = Literal["canonical", "panels", "split_128"]
"""The order of the stored values and scales; see packing.py."""


@dataclass(frozen=True)
class FormatSpec:
    """How a format stores a weight."""

    dtype: jnp.dtype
    """Of the stored values; int4 stores two in a byte."""
    bits: int
    largest: float
    least: float
    """The range of stored values that weights become."""


FORMATS: dict[Format, FormatSpec] = {
    "fp8_e4m3": FormatSpec(jnp.dtype(jnp.float8_e4m3fn), 8, 448.0, -448.0),
    "int8": FormatSpec(jnp.dtype(jnp.int8), 8, 127.0, -127.0),
    "int4": FormatSpec(jnp.dtype(jnp.uint8), 4, 7.0, -8.0),
}


class MatrixDims(NamedTuple):
    """Which dimensions of a weight make its matrix: those before them only stack matrices.

    q [D, H, C] is (1, 2), o [H, C, D] is (2, 1); an output layer [V, D] that is also an embedding
    table is (1, 1, outputs_first=True).
    """

    inputs: int = 1
    """Dimensions that a product sums over."""
    outputs: int = 1
    outputs_first: bool = False
    """Whether the outputs' dimensions come before the inputs'."""

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The sizes of the stack, of the inputs and of the outputs.

        Raises:
          ValueError: the shape has too few dimensions.
        """
        count = self.inputs + self.outputs
        if min(self.inputs, self.outputs) < 1 or len(shape) < count:
            raise ValueError(
                f"a weight of shape {shape} has no {self.inputs} dimensions of inputs and "
                f"{self.outputs} of outputs"
            )
        stack, rest = shape[: len(shape) - count], shape[len(shape) - count :]
        first = self.outputs if self.outputs_first else self.inputs
        parts = rest[:first], rest[first:]
        return stack, *(parts[::-1] if self.outputs_first else parts)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "offsets"),
    meta_fields=("format", "block_size", "packing", "inputs", "outputs", "outputs_first"),
)
@dataclass(frozen=True)
class QTensor:
    """w[..., k, n] = values[..., n, k] * scales[..., s, n] + offsets[..., s, n], of a weight's
    shape, where s = k // block_size.

    Passes through jit, scan and checkpoints as a weight; only kernels/ opens it. The stack's
    dimensions follow from the stored ones, so slicing them (as a scan over layers does, or a mesh
    that splits experts) keeps the shape true. Those of inputs and outputs are static.
    """

    values: jax.Array
    """[..., N, K] in the format's dtype: an output's inputs lie together. int4: uint8
    [..., N, K/2], two's complement nibbles. Their order is what `packing` says."""
    scales: jax.Array
    """float32 or bfloat16 [..., S, N], of panels [..., N/16, S, 16]."""
    format: Format
    block_size: int
    """Inputs that share a scale."""
    packing: Packing = "canonical"
    inputs: tuple[int, ...] | None = None
    """Sizes of the dimensions that a product sums over; None: one, K."""
    outputs: tuple[int, ...] | None = None
    """Sizes of the outputs' dimensions; None: one, N."""
    outputs_first: bool = False
    offsets: jax.Array | None = None
    """Laid out as scales, in their dtype; None: all are 0."""

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the dimensions that stack matrices."""
        return self.values.shape[:-2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        num_outputs, stored = self.values.shape[-2:]
        return stored * self.values.dtype.itemsize * 8 // self.bits, num_outputs

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's: the stack, the inputs and the outputs, or these two the other way round.

        Raises:
          ValueError: what is stored is another matrix: only the stack can be sliced or split.
        """
        num_inputs, num_outputs = self.matrix_shape
        inputs, outputs = self.inputs or (num_inputs,), self.outputs or (num_outputs,)
        if (math.prod(inputs), math.prod(outputs)) != self.matrix_shape:
            raise ValueError(
                f"a QTensor of inputs {inputs} and outputs {outputs} holds {num_inputs} x "
                f"{num_outputs}: slice or split only the dimensions that stack matrices"
            )
        parts = (outputs, inputs) if self.outputs_first else (inputs, outputs)
        return (*self.stack, *parts[0], *parts[1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def bits(self) -> int:
        """Of a stored value, without its share of a scale."""
        return FORMATS[self.format].bits

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and offsets."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def as_matrices(self) -> "QTensor":
        """The same weights as [..., K, N]."""
        return replace(self, inputs=None, outputs=None, outputs_first=False)
