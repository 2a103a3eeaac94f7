"""Parts that layers with a recurrent state share: the state, what leaves the heads, and how rates
and steps begin.

B batch, L length, R rows of the state, D d_model, H heads of values, K width of a key, V of a
value, T taps, N channels of the convolution.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels.quantize import MatrixDims
from model.layer_state import RowsFirst, StateShape
from model.layers import project, weight

SLOWEST, FASTEST = 0.001, 0.1
"""Bounds of softplus(b) at the start, and the rates exp(a) are in 1..16: as in Mamba-2 (2024)."""


class RecurrentState(RowsFirst, struct.PyTreeNode):
    """What a sequence's tokens have left: one matrix a head, and the convolution's last inputs."""

    unrewindable_reason: ClassVar[str | None] = (
        "a recurrent state is the sum of all tokens, none of which can be taken out again"
    )
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = "a recurrence reads a row of tokens in order"

    s_RHKV: jax.Array
    tail_RTN: jax.Array
    """Inputs of the last taps - 1 tokens, the newest last."""

    def rewind(self, length_R: jax.Array) -> "RecurrentState":
        raise NotImplementedError(self.unrewindable_reason)

    def logical_axes(self) -> Any:
        return self.replace(s_RHKV=("batch", "heads", None, None), tail_RTN=("batch", None, None))


def empty_state(shape: StateShape, matrix: tuple[int, int, int], tail: tuple[int, int]) -> Any:
    """A RecurrentState in float32, whatever the shape says of keys.

    Args:
      matrix: H, K and V.
      tail: the tokens that the convolution still sees, and its channels.
    """
    dims = (*shape.stack, shape.num_rows)
    return RecurrentState(
        jnp.zeros((*dims, *matrix), jnp.float32), jnp.zeros((*dims, *tail), jnp.float32)
    )


def visible_keys(config: Any, places: np.ndarray) -> np.ndarray:
    """One state stands for all of them."""
    del config
    return np.ones_like(places)


def heads_out(
    module: nn.Module,
    out_BLHV: jax.Array,
    d_model: int,
    stddev: float,
    state: RecurrentState | None,
) -> jax.Array:
    """All heads' results through the parameter "o", [B, L, D]."""
    shape, axes = (*out_BLHV.shape[2:], d_model), ("heads", "head_dim", "embed")
    w_HVD = weight(module, "o", shape, axes, stddev, MatrixDims(2, 1))
    return project("BLHV,HVD->BLD", out_BLHV, w_HVD, is_flat=state is not None)


def boxed(draw: Any, *axes: str | None) -> Any:
    """An initialiser whose parameter names its axes."""
    return nn.with_logical_partitioning(draw, axes)


def log_rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Logarithms of the rates at which a state forgets."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def step_biases(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Biases whose softplus is drawn evenly by its logarithm."""
    least, most = np.log(SLOWEST), np.log(FASTEST)
    softplus = jnp.exp(jax.random.uniform(key, shape, dtype, least, most))
    return jnp.log(jnp.expm1(softplus))
