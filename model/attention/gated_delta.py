"""Gated delta net: linear attention whose state forgets and corrects (Yang et al. 2024).

    S_t = alpha_t S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t

alpha = exp(-exp(a) softplus(f(x) + b)) forgets, one number for a head or for each channel of its
keys (Kimi delta attention, 2025); beta = sigmoid(x w), or twice that, says how much of the value
that k stands for is replaced. Queries, keys and values go through a causal convolution of a few
taps and SiLU; queries and keys have length 1. A head's result is normed and gated. The state of a
sequence has one size, however long it is.

B batch, L length, R rows of the state, D d_model, G heads of keys, H heads of values, K width of a
key, V of a value, T taps, N channels of the convolution, M gate_rank.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.recurrent_attention import GatedDeltaConfig
from kernels.delta_rule import delta_rule
from kernels.quantize import MatrixDims
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
from model.layers import RMSNorm, parameter, project, weight
from model.step import Step, require_own_rows
from parallel.sharding import on_shards

NORM_EPS = 1e-6
"""Of the length of queries and keys, as the authors' code has it."""


def init_state(config: GatedDeltaConfig, shape: StateShape) -> RecurrentState:
    """An empty state, in float32 whatever the shape says of keys."""
    matrix = (config.num_heads, config.key_head_dim, config.value_head_dim)
    return empty_state(shape, matrix, (config.conv_width - 1, config.conv_channels))


def mixing_flops(config: GatedDeltaConfig, places: np.ndarray) -> float:
    """What the key stands for, the correction, the query: three products with the state."""
    del places
    matrix = config.num_heads * config.key_head_dim * config.value_head_dim
    return 2.0 * (3 * matrix + config.conv_width * config.conv_channels)


class GatedDelta(nn.Module):
    """The layer."""

    config: GatedDeltaConfig
    norm_eps: float
    out_stddev: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, step: Step, state: RecurrentState | None
    ) -> tuple[jax.Array, RecurrentState | None]:
        require_own_rows(step, RecurrentState.unmixable_reason)
        c, d_model = self.config, x_BLD.shape[-1]
        begun = state or init_state(c, StateShape(x_BLD.shape[0], 0, "float32"))
        q_BLHK, k_BLHK, v_BLHV, tail_RTN = self._mixed(x_BLD, step, begun.tail_RTN)
        w_beta_DH = weight(self, "beta", (d_model, c.num_heads), ("embed", "heads"), d_model**-0.5)
        x32_BLD = x_BLD.astype(jnp.float32)
        beta_BLH = jax.nn.sigmoid(x32_BLD @ w_beta_DH)
        beta_BLH = 2 * beta_BLH if c.doubled_beta else beta_BLH
        heads = ("batch", None, "heads")
        out_BLHV, s_RHKV = on_shards(
            delta_rule,
            [
                _unit(q_BLHK) * c.key_head_dim**-0.5,
                _unit(k_BLHK),
                v_BLHV,
                self._log_decay(x32_BLD),
                beta_BLH,
                step.positions_BL,
                begun.s_RHKV,
            ],
            [(*heads, None)] * 4 + [heads, ("batch", None), ("batch", "heads", None, None)],
            [(*heads, None), ("batch", "heads", None, None)],
        )
        eps = self.norm_eps if c.norm_eps is None else c.norm_eps
        out_BLHV = RMSNorm(eps, ("head_dim",), name="norm")(out_BLHV)
        if c.output_gate is not None:
            gate = jax.nn.silu if c.output_gate == "silu" else jax.nn.sigmoid
            gate_BLHV = self._projected("gate", x_BLD, c.value_head_dim)
            out_BLHV *= gate(gate_BLHV.astype(jnp.float32))
        out_BLD = heads_out(self, out_BLHV.astype(x_BLD.dtype), d_model, self.out_stddev, state)
        return out_BLD, None if state is None else RecurrentState(s_RHKV, tail_RTN)

    def _mixed(
        self, x_BLD: jax.Array, step: Step, tail_BTN: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries, keys (those of a group of heads repeated) and values, float32, and the tail."""
        c, d_model = self.config, x_BLD.shape[-1]
        w_DN = weight(
            self,
            "qkv",
            (d_model, c.conv_channels),
            ("embed", "heads"),
            d_model**-0.5,
            MatrixDims(1, 1),
        )
        taps = (c.conv_width, c.conv_channels)
        taps_TN = weight(self, "conv", taps, (None, "heads"), c.conv_width**-0.5)
        in_BLN = project("BLD,DN->BLN", x_BLD, w_DN).astype(jnp.float32)
        mixed_BLN, tail_BTN = _convolve(in_BLN, tail_BTN, taps_TN, step.positions_BL)
        q, k, v = jnp.split(mixed_BLN, [c.key_width, 2 * c.key_width], axis=-1)
        q_BLGK, k_BLGK = (x.reshape(*x.shape[:2], -1, c.key_head_dim) for x in (q, k))
        group = c.num_heads // q_BLGK.shape[2]
        q_BLHK, k_BLHK = (jnp.repeat(x, group, axis=2) for x in (q_BLGK, k_BLGK))
        return q_BLHK, k_BLHK, v.reshape(*v.shape[:2], c.num_heads, -1), tail_BTN

    def _log_decay(self, x32_BLD: jax.Array) -> jax.Array:
        """[B, L, H, 1], or [B, L, H, K] of channels; float32."""
        c = self.config
        width = 1 if c.decay == "head" else c.key_head_dim
        rate_H = parameter(self, "log_rate", boxed(log_rates, "heads"), (c.num_heads,))
        axes = ("heads", None)
        bias_HK = parameter(self, "decay_bias", boxed(step_biases, *axes), (c.num_heads, width))
        moved_BLHK = self._projected("decay", x32_BLD, width) + bias_HK[None, None]
        return -jnp.exp(rate_H)[None, None, :, None] * jax.nn.softplus(moved_BLHK)

    def _projected(self, name: str, x_BLD: jax.Array, width: int) -> jax.Array:
        """[B, L, H, width] through one matrix, or two where there is a rank."""
        c, d_model = self.config, x_BLD.shape[-1]
        if c.gate_rank is not None and width > 1:
            shape, stddev = (d_model, c.gate_rank), d_model**-0.5
            w_DM = weight(self, f"{name}_in", shape, ("embed", None), stddev, MatrixDims(1, 1))
            x_BLD, d_model, name = project("BLD,DM->BLM", x_BLD, w_DM), c.gate_rank, f"{name}_out"
        axes = (None if name.endswith("_out") else "embed", "heads", None)
        shape = (d_model, c.num_heads, width)
        dims = MatrixDims(1, 2) if width > 1 else None
        return project("BLD,DHK->BLHK", x_BLD, weight(self, name, shape, axes, d_model**-0.5, dims))


def _convolve(
    x_BLN: jax.Array, tail_BTN: jax.Array, taps_TN: jax.Array, positions_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """SiLU of the causal convolution, and the tail: see `causal_convolution`."""
    out_BLN, tail_BTN = causal_convolution(x_BLN, tail_BTN, taps_TN, positions_BL)
    return jax.nn.silu(out_BLN), tail_BTN


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + NORM_EPS)
