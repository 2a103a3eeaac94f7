"""The routed experts' weights, and what an expert computes of its rows.

D d_model, F d_ff, E experts, R rows sorted by expert, X experts of this shard.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from configs.feed_forward import MoEConfig, num_parts
from kernels.grouped_matmul import GATE_AND_UP, Implementation, grouped_matmul, grouped_swiglu
from kernels.quantize import MatrixDims, QTensor
from model.layers import AdaptedWeight, SplitWeight, gated, weight, zero_weight
from parallel.expert import GroupedFn
from parallel.mesh import TENSOR, axis_sizes
from parallel.sharding import LogicalAxes

WEIGHT_AXES = {
    "gate_up": ("expert", "embed", None, "mlp"),
    "down": ("expert", "mlp", "embed"),
    "gate_up_bias": ("expert", None, "mlp"),
    "down_bias": ("expert", "embed"),
    "gate_up_a": ("expert", "embed", None, None),
    "gate_up_b": ("expert", None, None, "mlp"),
    "down_a": ("expert", "mlp", None),
    "down_b": ("expert", None, "embed"),
}
LOW_RANK = "low_rank"
"""Name of what an adapter's first matrix gives."""
KEPT = (GATE_AND_UP, LOW_RANK)
"""Names of what the backward pass keeps of an expert's work; the activation, which no product is
needed for, it computes again: it would fill as much memory as gate and up do, and half of that.
"""


def expert_weights(
    module: nn.Module,
    config: MoEConfig,
    d_model: int,
    out_stddev: float,
    num_experts: int | None = None,
) -> dict[str, Any]:
    """The module's float32 parameters gate_up [E, D, I, F] and down [E, F, D], with config.bias
    gate_up_bias [E, I, F] and down_bias [E, D], where I is 2, gate and up, or 1; with adapters
    (model/adapters.py) of rank r also gate_up_a [E, D, I, r], gate_up_b [E, I, r, F], down_a
    [E, F, r] and down_b [E, r, D].

    Args:
      d_model: D, of what experts read and give.
      num_experts: E, where not all that the config has are held.
    """
    experts, d_ff = num_experts or config.num_experts, config.d_ff
    parts = num_parts(config.activation)
    shapes = {"gate_up": (experts, d_model, parts, d_ff), "down": (experts, d_ff, d_model)}
    stddevs = {"gate_up": d_model**-0.5, "down": out_stddev}
    dims = {"gate_up": MatrixDims(1, 2), "down": MatrixDims(1, 1)}
    weights = {
        name: weight(module, name, shape, WEIGHT_AXES[name], stddevs[name], dims[name])
        for name, shape in shapes.items()
    }
    for name, held in list(weights.items()):
        if isinstance(held, AdaptedWeight):
            weights |= {name: held.weight, f"{name}_a": held.a, f"{name}_b": held.b}
    if config.bias:
        biases = {"gate_up_bias": (experts, parts, d_ff), "down_bias": (experts, d_model)}
        for name, shape in biases.items():
            weights[name] = zero_weight(module, name, shape, WEIGHT_AXES[name])
    return weights


def weight_axes(weights: dict[str, Any]) -> dict[str, LogicalAxes]:
    """The logical axes of each weight, as `apply_experts` takes them. Those of few bits are stacked
    by expert, and on a mesh with a tensor axis by part.
    """

    def axes(name: str, held: Any) -> LogicalAxes:
        if isinstance(held, SplitWeight):
            return ("expert", "mlp")
        return ("expert",) if isinstance(held, QTensor) else WEIGHT_AXES[name]

    return {name: axes(name, held) for name, held in weights.items()}


def has_few_bits(weights: dict[str, Any]) -> bool:
    """Whether they are held in less than float32."""
    held = weights["gate_up"]
    return isinstance(held, QTensor | SplitWeight) or held.dtype != jnp.float32


def expert_function(
    config: MoEConfig,
    implementation: Implementation,
    weights: dict[str, Any],
    *,
    fixed_order: bool = False,
) -> GroupedFn:
    """What parallel.expert.apply_experts takes as grouped_fn, for weights as above.

    Args:
      fixed_order: whether a row's bits may not depend on the other rows of its expert.
    """
    is_adapted = any(name.endswith("_a") for name in weights)
    if config.activation == "swiglu" and not config.bias and not is_adapted:
        return functools.partial(
            _swiglu_experts, implementation=implementation, fixed_order=fixed_order
        )
    return functools.partial(
        _other_experts, config=config, implementation=implementation, fixed_order=fixed_order
    )


def _swiglu_experts(
    x_RD: jax.Array,
    group_sizes_X: jax.Array,
    weights: dict[str, Any],
    *,
    implementation: Implementation,
    fixed_order: bool,
) -> jax.Array:
    """W_down(silu(W_gate x) * W_up x) of each row with its own expert's matrices, [R, D]."""
    gate_up, down = _own(weights["gate_up"]), _own(weights["down"])
    how: Any = {"implementation": implementation, "fixed_order": fixed_order}
    h_RF = grouped_swiglu(x_RD, gate_up, group_sizes_X, **how)
    return grouped_matmul(h_RF, down, group_sizes_X, **how)


def _other_experts(
    x_RD: jax.Array,
    group_sizes_X: jax.Array,
    weights: dict[str, Any],
    *,
    config: MoEConfig,
    implementation: Implementation,
    fixed_order: bool,
) -> jax.Array:
    """W_down activation(W_gate x + b_gate, W_up x + b_up) + b_down of each row with its own
    expert's matrices, adapters and biases, [R, D].

    Each shard of the tensor axis gives a part of the sum over F, so each adds its share of b_down.
    """
    w_gate_up_XDC = _gate_beside_up(_own(weights["gate_up"]))
    how: Any = {"implementation": implementation, "fixed_order": fixed_order}
    h_RC = grouped_matmul(x_RD, w_gate_up_XDC, group_sizes_X, **how)
    h_RIF = h_RC.reshape(x_RD.shape[0], num_parts(config.activation), -1)
    if "gate_up_a" in weights:
        h_RIF += _adapter_product(x_RD, group_sizes_X, weights, "gate_up")
    if config.bias:
        h_RIF += _of_own_expert(weights["gate_up_bias"], group_sizes_X, x_RD.shape[0])
    h_RIF = checkpoint_name(h_RIF, GATE_AND_UP)
    h_RF = activated(h_RIF[:, 0], h_RIF[:, -1], config).astype(x_RD.dtype)
    down = _own(weights["down"])
    y_RD = grouped_matmul(h_RF, down, group_sizes_X, **how)
    if "down_a" in weights:
        y_RD += _adapter_product(h_RF, group_sizes_X, weights, "down")
    if config.bias:
        share_XD = weights["down_bias"] / axis_sizes()[TENSOR]
        y_RD += _of_own_expert(share_XD, group_sizes_X, x_RD.shape[0])
    return y_RD


def _adapter_product(
    x_RD: jax.Array, group_sizes_X: jax.Array, weights: dict[str, Any], name: str
) -> jax.Array:
    """What the experts' low-rank adapters add to a product, in its shape: x A B of each row with
    its own expert's, gate and up apart.
    """
    a, b = weights[f"{name}_a"], weights[f"{name}_b"]
    h = checkpoint_name(grouped_matmul(x_RD, a.reshape(*a.shape[:2], -1), group_sizes_X), LOW_RANK)
    if b.ndim == 3:
        return grouped_matmul(h, b, group_sizes_X)
    h_R2r = h.reshape(h.shape[0], b.shape[1], -1)
    parts = [grouped_matmul(h_R2r[:, p], b[:, p], group_sizes_X) for p in range(b.shape[1])]
    return jnp.stack(parts, axis=1)


def activated(gate: jax.Array, up: jax.Array, config: MoEConfig) -> jax.Array:
    """What `gated` has, silu(gate) * up and its like, or with bounds l: (clip(up, -l, l) + 1) * g *
    sigmoid(a g) where g = min(gate, l) (gpt-oss, 2025); float32.
    """
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if config.activation != "clamped_swiglu":
        return gated(gate, up, config.activation, config.swiglu_limit)
    limit, alpha = config.swiglu_limit, config.swiglu_alpha
    assert limit is not None
    assert alpha is not None
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _own(w: jax.Array | QTensor | SplitWeight) -> jax.Array | QTensor:
    """What this device multiplies by."""
    return w.own() if isinstance(w, SplitWeight) else w


def _gate_beside_up(w_gate_up_XDIF: jax.Array | QTensor) -> jax.Array | QTensor:
    if isinstance(w_gate_up_XDIF, QTensor):
        return w_gate_up_XDIF
    return w_gate_up_XDIF.reshape(*w_gate_up_XDIF.shape[:2], -1)


def _of_own_expert(bias: jax.Array, group_sizes_X: jax.Array, rows: int) -> jax.Array:
    """bias[expert of r] of each of the sorted rows, [R, ...]; of any expert past the last group."""
    ends_X = jnp.cumsum(group_sizes_X)
    expert_R = jnp.searchsorted(ends_X, jnp.arange(rows), side="right")
    return bias.at[expert_R].get(mode="clip", indices_are_sorted=True)
