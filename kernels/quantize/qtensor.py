"""The QTensor: a matrix, or a stack of them, in few bits with a scale for each block of inputs.

K inputs, N outputs, S blocks of inputs (K / block_size). Leading dimensions (layers, experts) are
written "...".
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

Format = Literal["bf16", "fp8_e4m3", "int8", "int4"]
Packing = Literal["canonical", "panels", "split_128"]
"""The order of the stored values and scales; see packing.py."""


@dataclass(frozen=True)
class FormatSpec:
    """How a format stores a weight."""

    dtype: jnp.dtype
    """Of the stored values; int4 stores two in a byte."""
    bits: int
    largest: float
    """The stored value that the largest weight of a block becomes; 0: the format has no scales."""


FORMATS: dict[Format, FormatSpec] = {
    "bf16": FormatSpec(jnp.dtype(jnp.bfloat16), 16, 0.0),
    "fp8_e4m3": FormatSpec(jnp.dtype(jnp.float8_e4m3fn), 8, 448.0),
    "int8": FormatSpec(jnp.dtype(jnp.int8), 8, 127.0),
    "int4": FormatSpec(jnp.dtype(jnp.uint8), 4, 7.0),
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("format", "block_size", "packing"),
)
@dataclass(frozen=True)
class QTensor:
    """w[k, n] = values[n, k] * scales[k // block_size, n], of logical shape [..., K, N].

    Passes through jit, scan and checkpoints as a weight; only kernels/ opens it. The logical shape
    follows from the stored one, so slicing the leading dimensions (as a scan over layers does)
    keeps it true.
    """

    values: jax.Array
    """[..., N, K] in the format's dtype: an output's inputs lie together. int4: uint8
    [..., N, K/2], two's complement nibbles. Their order is what `packing` says."""
    scales: jax.Array
    """float32 or bfloat16 [..., S, N], of panels [..., N/16, S, 16]; bf16 has none: [..., 0, N]."""
    format: Format
    block_size: int
    """Inputs that share a scale; 0 for bf16."""
    packing: Packing = "canonical"

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N]."""
        *leading, num_outputs, stored = self.values.shape
        return (*leading, stored * self.values.dtype.itemsize * 8 // self.bits, num_outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def bits(self) -> int:
        """Of a stored value, without its share of a scale."""
        return FORMATS[self.format].bits

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes
