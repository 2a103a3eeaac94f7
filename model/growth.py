"""Doubling the experts of a trained model without changing what it computes.

Expert e's twin is expert E + e. Three operators, each exact (methods in the line of sparse
upcycling, Komatsuzaki et al. 2022, and expert upcycling, 2026):

- copy: twins are copies, top_k doubles. Both twins of a chosen expert are chosen, each with half of
  its gate: twice the active compute.
- reserve: twins are copies, top_k stays, and a bias keeps them from being chosen until training
  raises it. Costs nothing at first; needs a router with a bias.
- split: an expert's hidden width is shared out between the twins, top_k doubles, and gates are
  doubled, because each twin gives half of the sum. The same parameters and compute, finer experts.

P periods, E experts before.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from configs.architecture import LayerSpec, ModelConfig, MoEConfig, RouterConfig
from configs.checks import require
from model.transformer import Variables

Operator = Literal["copy", "reserve", "split"]

RESERVE_GAP = 2.0
"""By how much a reserved twin's bias lies below the lowest other one: more than scores, which lie
in [0, 1], can make up for.
"""


def grown_config(config: ModelConfig, operator: Operator) -> ModelConfig:
    """The model with twice the experts in each MoE layer.

    Raises:
      UserError: the model has no experts, or a router for which the operator is not exact.
    """
    require(
        any(isinstance(spec.ffn, MoEConfig) for spec in config.pattern),
        "growth needs MoE layers, and this model has none: upcycle it instead",
    )
    pattern = tuple(_grown_layer(spec, operator) for spec in config.pattern)
    return dataclasses.replace(config, pattern=pattern)


def _grown_layer(spec: LayerSpec, operator: Operator) -> LayerSpec:
    if not isinstance(spec.ffn, MoEConfig):
        return spec
    ffn, router = spec.ffn, spec.ffn.router
    _check(ffn, operator)
    if operator != "reserve":
        router = dataclasses.replace(
            router,
            top_k=2 * router.top_k,
            num_null_experts=2 * router.num_null_experts,
            target_k=None if router.target_k is None else 2 * router.target_k,
            gate_scale=router.gate_scale * _gate_factor(router, operator),
        )
    shared, d_ff = ffn.num_shared_experts, ffn.d_ff
    if operator == "split":
        shared, d_ff = 2 * shared, d_ff // 2
    grown = dataclasses.replace(
        ffn, num_experts=2 * ffn.num_experts, d_ff=d_ff, num_shared_experts=shared, router=router
    )
    return dataclasses.replace(spec, ffn=grown)


def _check(ffn: MoEConfig, operator: Operator) -> None:
    router = ffn.router
    require(
        router.num_groups is None,
        f"growth by {operator!r} is not exact with router.num_groups={router.num_groups}: a "
        "group's "
        "two best would be twins; leave the groups out first",
    )
    require(
        operator != "split" or ffn.d_ff % 2 == 0,
        f"growth by 'split' needs an even d_ff, got {ffn.d_ff}",
    )
    if operator != "reserve":
        return
    require(
        router.balance != "none",
        "growth by 'reserve' needs a router with a bias: set router.balance and router.bias_rate",
    )
    require(
        router.scores != "softmax" or router.normalize_gates,
        "growth by 'reserve' is not exact with softmax gates that are not renormalised: the twins "
        "would double the denominator",
    )
    require(
        router.scores != "sqrt_softplus" and router.num_null_experts == 0,
        "growth by 'reserve' needs scores between 0 and 1 and no null experts, whose softmax share "
        "the twins would halve",
    )


def _gate_factor(router: RouterConfig, operator: Operator) -> float:
    """By which gates must grow so that a pair of twins adds up to its parent.

    Renormalised gates and softmax scores are halved by the twins' presence; sigmoid and
    sqrt-softplus scores that are not renormalised are not.
    """
    is_halved = router.normalize_gates or router.scores == "softmax"
    wanted = 1.0 if operator == "copy" else 2.0
    return wanted if is_halved else wanted / 2


def grow(variables: Variables, config: ModelConfig, operator: Operator) -> Variables:
    """The variables of `grown_config(config, operator)`: the same function of every token.

    Args:
      variables: of a model with this config; arrays anywhere.
    Raises:
      UserError: as grown_config.
    """
    grown_config(config, operator)
    params = dict(variables["params"]["periods"])
    states = dict(variables["router_state"].get("periods", {}))
    for i, spec in enumerate(config.pattern):
        name = f"layer_{i}"
        if isinstance(spec.ffn, MoEConfig):
            params[name] = params[name] | {"moe": _grown_params(params[name]["moe"], operator)}
            if name in states:
                state = _grown_state(states[name], spec.ffn.router, operator)
                states[name] = {"moe": {"state": state}}
    return {
        "params": variables["params"] | {"periods": params},
        "router_state": {"periods": states} if states else {},
    }


def _grown_params(moe: dict[str, Any], operator: Operator) -> dict[str, Any]:
    """Experts lie in dim 1 of their matrices, and in the last dim of whatever makes logits."""
    halves = _halves if operator == "split" else _twice
    grown = moe | {
        "gate_up": jnp.concatenate(halves(moe["gate_up"], 4), axis=1),  # [P, E, D, 2, F]
        "down": jnp.concatenate(halves(moe["down"], 2), axis=1),  # [P, E, F, D]
    }
    for name in ("router", "correlation"):
        if name in moe:
            grown[name] = jax.tree.map(_doubled, moe[name])
    if "context" in moe:
        grown["context"] = moe["context"] | {"o": _doubled(moe["context"]["o"])}
    return grown


def _grown_state(layer: dict[str, Any], router: RouterConfig, operator: Operator) -> Any:
    """The twins' presence halves every softmax score, so the bias beside it is halved too."""
    state = layer["moe"]["state"]
    bias_PE = state.bias_E / 2 if router.scores == "softmax" else state.bias_E
    twin_PE = bias_PE
    if operator == "reserve":
        lowest_P1 = bias_PE.min(axis=-1, keepdims=True) - RESERVE_GAP
        twin_PE = jnp.broadcast_to(lowest_P1, bias_PE.shape)
    return state.replace(bias_E=jnp.concatenate([bias_PE, twin_PE], axis=-1))


def _doubled(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x], axis=-1)


def _twice(x: jax.Array, _: int) -> list[jax.Array]:
    return [x, x]


def _halves(x: jax.Array, axis: int) -> list[jax.Array]:
    return jnp.split(x, 2, axis=axis)
