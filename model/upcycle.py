"""A dense model's layers turned into experts without changing what it computes.

Sparse upcycling (Komatsuzaki et al. 2022): every expert begins as a copy of its layer's feed-
forward part and the router is drawn anew. Gates that sum to 1 make the layer a mean of equal
values, so the model is the same function at step 0, whatever the router says. Copies learn apart
from each other only by the tokens they get; `drop` sets them apart at once and gives the exactness
up (Drop-Upcycling, 2025): it draws a share of each expert's hidden units anew.

P periods, E experts.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError, require
from configs.feed_forward import DenseConfig, MoEConfig, RouterConfig
from configs.serialization import differences
from model.growth import redraw_units
from model.seeds import seed_key
from model.transformer import Transformer, Variables, init_variables


def upcycled_config(
    config: ModelConfig, *, num_experts: int, top_k: int, every: int = 1
) -> ModelConfig:
    """The model with this many experts in place of each dense layer of its pattern, each as wide as
    the layer was. Prefix and multi-token modules stay dense.

    The router has softmax scores, gates that sum to 1 and the load-balance loss (Mixtral's).

    Args:
      every: only the last of so many layers of the pattern gets experts.
    Raises:
      UserError: no dense layer to turn, or numbers that don't fit each other.
    """
    require(every >= 1, f"every={every} must be at least 1: one in so many layers gets experts")
    count = math.lcm(len(config.pattern), every)
    periodic = config.num_layers - len(config.prefix)
    require(
        periodic % count == 0,
        f"every={every} must divide the {periodic} layers of the pattern, together with its period "
        f"of {len(config.pattern)}",
    )
    layers = config.pattern * (count // len(config.pattern))
    router = RouterConfig(top_k=top_k)

    def upcycled(i: int, spec: LayerSpec) -> LayerSpec:
        if not isinstance(spec.ffn, DenseConfig) or (i + 1) % every:
            return spec
        old = spec.ffn
        ffn = MoEConfig(num_experts=num_experts, d_ff=old.d_ff, router=router, bias=old.bias)
        return dataclasses.replace(spec, ffn=ffn)

    pattern = tuple(upcycled(i, spec) for i, spec in enumerate(layers))
    require(
        pattern != layers,
        f"upcycling found no dense layer at every={every} of the pattern: a model of experts grows "
        "instead",
    )
    return dataclasses.replace(config, pattern=pattern)


def upcycle(
    variables: Variables,
    dense: ModelConfig,
    upcycled: ModelConfig,
    *,
    drop: float = 0.0,
    seed: int = 0,
) -> Variables:
    """The variables of `upcycled`, which has experts where `dense` has layers: without `drop` the
    same function of every token.

    Args:
      variables: of the dense model; arrays anywhere.
      upcycled: as upcycled_config makes it, or with another router whose gates sum to 1.
      drop: share of each expert's hidden units that are drawn anew: one set of units per expert,
        the same in all its matrices.
      seed: of the routers and of what `drop` draws.
    Raises:
      UserError: models that differ in more than their experts, a router for which upcycling is not
        exact, or a drop that is no share.
    """
    check_upcycled(dense, upcycled)
    require(0 <= drop < 1, f"drop={drop} must lie in [0, 1)")
    fresh = _routers(upcycled, seed)
    periods = _regrouped(dense, upcycled, variables["params"]["periods"])
    states = _regrouped(dense, upcycled, variables["router_state"].get("periods", {}))
    for i, ffn in _new_layers(dense, upcycled):
        name = f"layer_{i}"
        layer = dict(periods[name])
        moe = fresh["params"][name] | _copies(layer.pop("ffn"), ffn.num_experts)
        if drop:
            key = jax.random.fold_in(seed_key(seed), i)
            moe |= redraw_units(moe, 0, drop, key)
        periods[name] = layer | {"moe": moe}
        if name in fresh["router_state"]:
            states[name] = {"moe": fresh["router_state"][name]}
    router_state = dict(variables["router_state"]) | ({"periods": states} if states else {})
    return {"params": variables["params"] | {"periods": periods}, "router_state": router_state}


def check_upcycled(dense: ModelConfig, upcycled: ModelConfig) -> None:
    """
    Raises:
      UserError: `upcycled` is not `dense` with experts in the place of some layers, or its router's
        gates do not sum to 1.
    """
    pairs = _pairs(dense, upcycled)
    before = dataclasses.replace(dense, pattern=tuple(old for old, _ in pairs))
    after = dataclasses.replace(upcycled, pattern=tuple(_without_experts(*pair) for pair in pairs))
    changed = differences(before, after, "model")
    if changed:
        raise UserError(
            f"upcycling changes experts alone, these models differ in more: {'; '.join(changed)}"
        )
    for _, spec in pairs:
        if isinstance(spec.ffn, MoEConfig):
            _check_exact(spec.ffn)


def _check_exact(ffn: MoEConfig) -> None:
    router = ffn.router
    require(
        router.normalize_gates and router.gate_scale == 1.0,
        "upcycling is not exact with gates that don't sum to 1: set router.normalize_gates=True "
        f"and router.gate_scale=1.0, got {router.normalize_gates} and {router.gate_scale}",
    )
    require(
        router.gates_on == "outputs" and not router.expert_scales,
        "upcycling is not exact with gates on inputs or scales of experts: leave router.gates_on "
        "and router.expert_scales out",
    )
    require(
        ffn.num_shared_experts == 0,
        f"upcycling fills routed experts only, got num_shared_experts={ffn.num_shared_experts}: a "
        "shared copy would count twice",
    )
    require(
        ffn.activation == "swiglu",
        f"upcycling copies SwiGLU layers, got activation={ffn.activation!r}: use 'swiglu'",
    )


def _pairs(dense: ModelConfig, upcycled: ModelConfig) -> list[tuple[LayerSpec, LayerSpec]]:
    """Each layer of the new pattern behind the one it was.

    Raises:
      UserError: the new pattern is no multiple of the old one.
    """
    old, new = len(dense.pattern), len(upcycled.pattern)
    require(
        new % old == 0,
        f"upcycling needs a pattern of a multiple of the dense model's {old} layers, got {new}",
    )
    return list(zip(dense.pattern * (new // old), upcycled.pattern, strict=True))


def _new_layers(dense: ModelConfig, upcycled: ModelConfig) -> list[tuple[int, MoEConfig]]:
    """Places in the new pattern of the layers that get experts, and what they get."""
    return [
        (i, new.ffn)
        for i, (old, new) in enumerate(_pairs(dense, upcycled))
        if isinstance(old.ffn, DenseConfig) and isinstance(new.ffn, MoEConfig)
    ]


def _without_experts(old: LayerSpec, new: LayerSpec) -> LayerSpec:
    """The new layer as it was before it got experts."""
    if isinstance(old.ffn, DenseConfig) and isinstance(new.ffn, MoEConfig):
        return dataclasses.replace(new, ffn=DenseConfig(d_ff=new.ffn.d_ff, bias=new.ffn.bias))
    return new


def _regrouped(
    dense: ModelConfig, upcycled: ModelConfig, periods: dict[str, Any]
) -> dict[str, Any]:
    """A collection's layers, stacked by the new period: layer 1 of each two old periods of one
    layer is every second of the old layer 0, beginning with its second."""
    old = len(dense.pattern)
    times = len(upcycled.pattern) // old
    return {
        f"layer_{i}": jax.tree.map(lambda x, k=i // old: x[k::times], periods[f"layer_{i % old}"])
        for i in range(len(upcycled.pattern))
        if f"layer_{i % old}" in periods
    }


def _copies(ffn: dict[str, jax.Array], num_experts: int) -> dict[str, jax.Array]:
    """gate_up [P, E, D, 2, F] and down [P, E, F, D] of a layer's [P, D, 2, F] and [P, F, D], and
    the biases of a layer that has them: gates sum to 1, so that each counts once.
    """
    return {name: jnp.repeat(jnp.asarray(x)[:, None], num_experts, 1) for name, x in ffn.items()}


def _routers(config: ModelConfig, seed: int) -> dict[str, dict[str, Any]]:
    """What a fresh model has in its MoE layers but for the experts, by collection and layer; XLA
    draws nothing else."""

    def draw() -> dict[str, dict[str, Any]]:
        fresh = init_variables(Transformer(config), seed)
        moe = {
            collection: {
                name: layer["moe"]
                for name, layer in fresh[collection].get("periods", {}).items()
                if "moe" in layer
            }
            for collection in ("params", "router_state")
        }
        experts = ("gate_up", "down", "gate_up_bias", "down_bias")
        for name, layer in moe["params"].items():
            moe["params"][name] = {k: x for k, x in layer.items() if k not in experts}
        return moe

    return jax.jit(draw)()
