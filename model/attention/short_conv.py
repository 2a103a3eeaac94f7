"""Gated short convolution: a layer that mixes a token with the few before it (LFM2, 2025).

    y = W_o (c * conv(b * x)),    [b; c; x] = W_in token

B batch, L length, R rows of the state, D d_model, T taps, N channels.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from configs.recurrent_attention import ShortConvConfig
from kernels.quantize import MatrixDims
from model.causal_convolution import causal_convolution
from model.layer_state import RowsFirst, StateShape
from model.layers import project, weight, zero_weight
from model.step import Step, require_own_rows


class TailState(RowsFirst, struct.PyTreeNode):
    """What the next tokens still see: the convolution's last inputs."""

    unrewindable_reason: ClassVar[str | None] = (
        "a convolution keeps its last inputs alone, and those before them are gone"
    )
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = "a convolution reads a row of tokens in order"

    tail_RTN: jax.Array
    """Of the last taps - 1 tokens, the newest last; float32."""

    def rewind(self, length_R: jax.Array) -> "TailState":
        raise NotImplementedError(self.unrewindable_reason)

    def logical_axes(self) -> Any:
        return self.replace(tail_RTN=("batch", None, None))


def init_state(config: ShortConvConfig, shape: StateShape) -> TailState:
    """An empty state, in float32 whatever the shape says of keys."""
    dims = (*shape.stack, shape.num_rows, config.conv_width - 1, config.channels)
    return TailState(jnp.zeros(dims, jnp.float32))


def visible_keys(config: ShortConvConfig, places: np.ndarray) -> np.ndarray:
    """The tokens under the taps."""
    return np.minimum(places, config.conv_width)


def mixing_flops(config: ShortConvConfig, places: np.ndarray) -> float:
    """The taps, and the products with both gates."""
    del places
    return 2.0 * (config.conv_width + 1) * config.channels


class ShortConv(nn.Module):
    """The layer."""

    config: ShortConvConfig
    out_stddev: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, step: Step, state: TailState | None
    ) -> tuple[jax.Array, TailState | None]:
        require_own_rows(step, TailState.unmixable_reason)
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        in_shape, in_axes = (3, c.channels), (None, "heads")
        stddev, dims = d_model**-0.5, MatrixDims(1, 2)
        w_D3N = weight(self, "in", (d_model, *in_shape), ("embed", *in_axes), stddev, dims)
        in_BL3N = project("BLD,DiN->BLiN", x_BLD, w_D3N)
        if c.bias:
            in_BL3N += zero_weight(self, "in_bias", in_shape, in_axes).astype(dtype)[None, None]
        b_BLN, c_BLN, v_BLN = (in_BL3N[:, :, i].astype(jnp.float32) for i in range(3))
        taps = (c.conv_width, c.channels)
        taps_TN = weight(self, "conv", taps, (None, "heads"), c.conv_width**-0.5)
        begun = state or init_state(c, StateShape(x_BLD.shape[0], 0, "float32"))
        mixed_BLN, tail_RTN = causal_convolution(
            b_BLN * v_BLN, begun.tail_RTN, taps_TN, step.positions_BL
        )
        if c.bias:
            mixed_BLN += zero_weight(self, "conv_bias", taps[1:], ("heads",))[None, None]
        w_ND = weight(
            self,
            "o",
            (c.channels, d_model),
            ("heads", "embed"),
            self.out_stddev,
            MatrixDims(1, 1),
        )
        out_BLD = project("BLN,ND->BLD", (c_BLN * mixed_BLN).astype(dtype), w_ND)
        if c.bias:
            out_BLD += zero_weight(self, "o_bias", (d_model,), ("embed",)).astype(dtype)[None, None]
        return out_BLD, None if state is None else TailState(tail_RTN)
