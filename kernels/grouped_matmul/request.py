"""A grouped product as it is asked for: what every implementation is given, and judges."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from kernels.backend import Target
from kernels.quantize import QTensor

Implementation = Literal["auto", "reference", "xla", "cpu", "triton", "mosaic"]
Activations = Literal["auto", "float", "int8"]

GATE_AND_UP = "gate_and_up"
"""Name (jax.ad_checkpoint.checkpoint_name) of the product that `grouped_swiglu` makes its result
of. Of a function that is computed again for the backward pass, it is worth keeping."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """x[rows[r]] @ weight[group of r], or the silu(gate) * up of its halves."""

    x_TK: jax.Array
    weight: jax.Array | QTensor
    """[E, K, N], of matrices alone; an array of outputs_first is [E, N, K]."""
    outputs_first: bool = False
    group_sizes_E: jax.Array
    rows_R: jax.Array | None = None
    """None: x is sorted, and R is T."""
    gated: bool = False
    activations: Activations = "auto"
    fixed_order: bool = False
    implementation: Implementation = "auto"
    target: Target
    """The default device's."""

    @property
    def num_rows(self) -> int:
        return self.x_TK.shape[0] if self.rows_R is None else self.rows_R.shape[0]

    @property
    def num_groups(self) -> int:
        return self.weight.shape[0]

    @property
    def num_outputs(self) -> int:
        """Of a row of the result."""
        width = self.weight.shape[-2 if self.outputs_first else -1]
        return width // (2 if self.gated else 1)

    @property
    def weight_is_mixed(self) -> bool:
        """Whether the weight is an array of another dtype than x."""
        weight = self.weight
        return not isinstance(weight, QTensor) and weight.dtype != self.x_TK.dtype

    @property
    def array_EKN(self) -> jax.Array:
        """The weight, which is no QTensor, with its inputs first."""
        assert not isinstance(self.weight, QTensor)
        return jnp.swapaxes(self.weight, 1, 2) if self.outputs_first else self.weight

    @property
    def sorted_x(self) -> jax.Array:
        """[R, K]."""
        return self.x_TK if self.rows_R is None else self.x_TK[self.rows_R]
