"""Mamba-2: linear attention whose state forgets at rates that the tokens set (Dao & Gu 2024).

    S_t = exp(-rate step_t) S_(t-1) + step_t B_t x_t^T,    y_t = C_t S_t + skip x_t

step = softplus(W x + b), one number a head. x, B (keys) and C (queries) go through a causal
convolution of a few taps and SiLU; the result is multiplied by silu of a gate, and normed. The
state of a sequence has one size, however long it is.

B batch, L length, D d_model, G groups of heads, H heads, J heads of a group, K state_dim, V
head_dim, T taps, N channels of the convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.recurrent_attention import Mamba2Config
from kernels.quantize import MatrixDims
from kernels.state_space import state_space
from model.attention.recurrent import (
    RecurrentState,
    boxed,
    empty_state,
    heads_out,
    log_rates,
    step_biases,
)
from model.causal_convolution import causal_convolution
from model.layer_state import StateShape
from model.layers import one_weight, parameter, project, unscaled_rms_norm, weight, zero_weight
from model.step import Step, require_own_rows
from parallel.sharding import on_shards


def init_state(config: Mamba2Config, shape: StateShape) -> RecurrentState:
    """An empty state, in float32 whatever the shape says of keys."""
    matrix = (config.num_heads, config.state_dim, config.head_dim)
    return empty_state(shape, matrix, (config.conv_width - 1, config.conv_channels))


def mixing_flops(config: Mamba2Config, places: np.ndarray) -> float:
    """What is written and what is read, two products with the state; and the taps."""
    del places
    matrix = config.num_heads * config.state_dim * config.head_dim
    return 2.0 * (2 * matrix + config.conv_width * config.conv_channels)


class Mamba2(nn.Module):
    """The layer."""

    config: Mamba2Config
    norm_eps: float
    out_stddev: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, step: Step, state: RecurrentState | None
    ) -> tuple[jax.Array, RecurrentState | None]:
        require_own_rows(step, RecurrentState.unmixable_reason)
        c, d_model = self.config, x_BLD.shape[-1]
        begun = state or init_state(c, StateShape(x_BLD.shape[0], 0, "float32"))
        v_BLHV, k_BLGK, q_BLGK, tail_RTN = self._mixed(x_BLD, step, begun.tail_RTN)
        step_BLH = self._steps(x_BLD.astype(jnp.float32))
        rate_H = jnp.exp(parameter(self, "log_rate", boxed(log_rates, "heads"), (c.num_heads,)))
        heads, matrix = ("batch", None, "heads"), ("batch", "heads", None, None)
        out_BLHV, s_RHKV = on_shards(
            state_space,
            [
                q_BLGK,
                k_BLGK,
                step_BLH[..., None] * v_BLHV,
                -rate_H[None, None] * step_BLH,
                step.positions_BL,
                begun.s_RHKV,
            ],
            [(*heads, None)] * 3 + [heads, ("batch", None), matrix],
            [(*heads, None), matrix],
        )
        skip_H = one_weight(self, "skip", (c.num_heads,), ("heads",))
        out_BLHV += skip_H[None, None, :, None] * v_BLHV
        out_BLHV = self._normed(out_BLHV * jax.nn.silu(self._gate(x_BLD)))
        out_BLD = heads_out(self, out_BLHV.astype(x_BLD.dtype), d_model, self.out_stddev, state)
        if c.bias:
            bias_D = zero_weight(self, "o_bias", (d_model,), ("embed",))
            out_BLD += bias_D.astype(x_BLD.dtype)[None, None]
        return out_BLD, None if state is None else RecurrentState(s_RHKV, tail_RTN)

    def _mixed(
        self, x_BLD: jax.Array, step: Step, tail_BTN: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Values, keys and queries, float32, and the tail."""
        c, d_model = self.config, x_BLD.shape[-1]
        shape, axes = (d_model, c.conv_channels), ("embed", "heads")
        w_DN = weight(self, "in", shape, axes, d_model**-0.5, MatrixDims(1, 1))
        in_BLN = project("BLD,DN->BLN", x_BLD, w_DN).astype(jnp.float32)
        if c.bias:
            in_BLN += zero_weight(self, "in_bias", shape[1:], ("heads",))[None, None]
        taps = (c.conv_width, c.conv_channels)
        taps_TN = weight(self, "conv", taps, (None, "heads"), c.conv_width**-0.5)
        mixed_BLN, tail_BTN = causal_convolution(in_BLN, tail_BTN, taps_TN, step.positions_BL)
        if c.conv_bias:
            mixed_BLN += zero_weight(self, "conv_bias", taps[1:], ("heads",))[None, None]
        mixed_BLN = jax.nn.silu(mixed_BLN)
        keys = c.num_groups * c.state_dim
        v, k, q = jnp.split(mixed_BLN, [c.out_width, c.out_width + keys], axis=-1)
        v_BLHV = v.reshape(*v.shape[:2], c.num_heads, c.head_dim)
        k_BLGK, q_BLGK = (x.reshape(*x.shape[:2], c.num_groups, c.state_dim) for x in (k, q))
        return v_BLHV, k_BLGK, q_BLGK, tail_BTN

    def _steps(self, x32_BLD: jax.Array) -> jax.Array:
        """How much each head writes of a token, and forgets for it; float32 [B, L, H]."""
        c, d_model = self.config, x32_BLD.shape[-1]
        heads = (c.num_heads,)
        w_DH = weight(self, "step", (d_model, *heads), ("embed", "heads"), d_model**-0.5)
        bias_H = parameter(self, "step_bias", boxed(step_biases, "heads"), heads)
        if c.bias:
            bias_H += zero_weight(self, "step_in_bias", heads, ("heads",))
        return jnp.maximum(jax.nn.softplus(x32_BLD @ w_DH + bias_H[None, None]), c.least_step)

    def _gate(self, x_BLD: jax.Array) -> jax.Array:
        """Float32 [B, L, H, V], before silu."""
        c, d_model = self.config, x_BLD.shape[-1]
        shape, axes = (c.num_heads, c.head_dim), ("heads", None)
        stddev, dims = d_model**-0.5, MatrixDims(1, 2)
        w_DHV = weight(self, "gate", (d_model, *shape), ("embed", *axes), stddev, dims)
        gate_BLHV = project("BLD,DHV->BLHV", x_BLD, w_DHV).astype(jnp.float32)
        if c.bias:
            gate_BLHV += zero_weight(self, "gate_bias", shape, axes)[None, None]
        return gate_BLHV

    def _normed(self, y_BLHV: jax.Array) -> jax.Array:
        """RMSNorm of all heads' results together, or of those of a group."""
        c = self.config
        groups = c.num_groups if c.norm_by_group else 1
        y = unscaled_rms_norm(y_BLHV.reshape(*y_BLHV.shape[:2], groups, -1), self.norm_eps)
        scale_HV = one_weight(self, "norm_scale", (c.num_heads, c.head_dim), ("heads", None))
        return y.reshape(y_BLHV.shape) * scale_HV[None, None]
