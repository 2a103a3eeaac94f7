"""The mixture-of-experts layer: router, routed experts, shared experts.

B batch, L length, T tokens (B * L), D d_model, F d_ff, E experts, K experts per token, R rows
sorted by expert, X experts of this shard.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.base import DenseConfig, ExecutionConfig, MoEConfig
from kernels.grouped_matmul import Implementation, grouped_matmul
from model.balance import router_stats
from model.layers import SwiGLU, weight
from model.router import route
from parallel.expert import apply_experts

WEIGHT_AXES = {"gate_up": ("expert", "embed", None, "mlp"), "down": ("expert", "mlp", "embed")}


class MoE(nn.Module):
    """sum over the chosen experts of gate * SwiGLU_e(x), plus the shared experts.

    Sows "stats" (RouterStats) into the collection "router"; the losses live in train/losses.py.
    """

    config: MoEConfig
    execution: ExecutionConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array, is_token_BL: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BLD.dtype
        batch, length, d_model = x_BLD.shape
        w_router_DE = weight(
            self, "router", (d_model, c.num_experts), ("embed", None), d_model**-0.5
        )
        gate_up_shape = (c.num_experts, d_model, 2, c.d_ff)
        down_shape = (c.num_experts, c.d_ff, d_model)
        weights = {
            "gate_up": weight(
                self, "gate_up", gate_up_shape, WEIGHT_AXES["gate_up"], d_model**-0.5
            ),
            "down": weight(self, "down", down_shape, WEIGHT_AXES["down"], self.out_stddev),
        }
        x_TD, is_token_T = x_BLD.reshape(batch * length, d_model), is_token_BL.reshape(-1)
        router_logits_TE = jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), w_router_DE)
        routing = route(router_logits_TE, c.router, is_token_T)
        out_TD, stats = apply_experts(
            x_TD,
            routing.expert_ids_TK,
            routing.gates_TK,
            jax.tree.map(lambda w: w.astype(dtype), weights),
            grouped_fn=functools.partial(
                swiglu_experts, implementation=self.execution.grouped_matmul
            ),
            num_experts=c.num_experts,
            weight_axes=WEIGHT_AXES,
            transport=self.execution.transport,
            capacity_factor=self.execution.capacity_factor,
        )
        self.sow(
            "router",
            "stats",
            router_stats(
                router_logits_TE,
                routing.counts_E,
                is_token_T,
                stats.overflow_rows,
                stats.bytes_moved,
            ),
            init_fn=lambda: None,
            reduce_fn=_newest,
        )
        out_BLD = out_TD.reshape(batch, length, d_model)
        if c.num_shared_experts:
            shared = DenseConfig(d_ff=c.num_shared_experts * c.d_ff)
            out_BLD += SwiGLU(shared, self.out_stddev, name="shared")(x_BLD)
        return out_BLD


def _newest(_: Any, new: Any) -> Any:
    return new


def swiglu_experts(
    x_RD: jax.Array,
    group_sizes_X: jax.Array,
    weights: dict[str, jax.Array],
    *,
    implementation: Implementation,
) -> jax.Array:
    """W_down(silu(W_gate x) * W_up x) of each row with its own expert's matrices, [R, D]."""
    w_gate_up_XD2F = weights["gate_up"]
    num_local, d_model, _, d_ff = w_gate_up_XD2F.shape
    matmul = functools.partial(grouped_matmul, implementation=implementation)
    h_R2F = matmul(x_RD, w_gate_up_XD2F.reshape(num_local, d_model, 2 * d_ff), group_sizes_X)
    h_RF = jax.nn.silu(h_R2F[:, :d_ff]) * h_R2F[:, d_ff:]
    return matmul(h_RF, weights["down"], group_sizes_X)
