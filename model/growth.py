"""Multiplying the experts of a trained model without changing what it computes.

With a factor n, expert e's twins are the experts E + e, 2 E + e, ... Three operators, each exact
(methods in the line of sparse upcycling, Komatsuzaki et al. 2022, and expert upcycling, 2026):

- copy: twins are copies, top_k grows n times. All twins of a chosen expert are chosen, each with an
  nth of its gate: n times the active compute.
- reserve: twins are copies, top_k stays, and a bias keeps them from being chosen until training
  raises it. Costs nothing at first; needs a router with a bias. With a warm-up they enter along a
  line (model/warmup.py), else as the router's balance lets them.
- split: an expert's hidden width is shared out between the twins, top_k grows n times, and so do
  the gates, because each twin gives a part of the sum. The same parameters and compute, finer
  experts.

Copies learn the same as long as they see the same. `drop` breaks that (Drop-Upcycling, 2025): it
draws a part of each twin's hidden units anew. That is exact for reserve only.

P periods, E experts before.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import require
from configs.feed_forward import BiasWarmupConfig, MoEConfig, RouterConfig
from model.moe_layers import MoELayer, map_layers, moe_layers
from model.router import RouterState
from model.router_scores import SCORES
from model.seeds import seed_key
from model.transformer import Variables
from model.warmup import initial_warmup

Operator = Literal["copy", "reserve", "split"]


@dataclass(frozen=True, kw_only=True)
class GrowthKind:
    """What an operator does to a layer."""

    widens_choice: bool
    """Whether a token goes to all twins of its experts, so that top_k grows with their number; else
    the twins are held back, by the router's bias."""
    cuts_experts: bool
    """Whether an expert's hidden units are shared out between its twins, whose results are summed;
    else the twins are copies."""


OPERATORS: dict[Operator, GrowthKind] = {
    "copy": GrowthKind(widens_choice=True, cuts_experts=False),
    "reserve": GrowthKind(widens_choice=False, cuts_experts=False),
    "split": GrowthKind(widens_choice=True, cuts_experts=True),
}

EXPERT_AND_WIDTH = {
    "gate_up": (-4, -1),
    "down": (-3, -2),
    "gate_up_bias": (-3, -1),
    "down_bias": (-2, None),
}
"""The dims of experts and of their hidden units: gate_up [..., E, D, 2, F], down [..., E, F, D],
gate_up_bias [..., E, 2, F], down_bias [..., E, D].
"""

RESERVE_GAP = 2.0
"""By how much a reserved twin's bias lies below the lowest other one: more than scores, which lie
in [0, 1], can make up for.
"""


def grown_config(
    config: ModelConfig, operator: Operator, factor: int = 2, warmup_steps: int | None = None
) -> ModelConfig:
    """The model with `factor` times the experts in each MoE layer.

    Args:
      warmup_steps: reserve only: steps over which the twins enter; None leaves that to the balance.
    Raises:
      UserError: a factor that is no integer above 1, a model without experts, or a router for which
        the operator is not exact.
    """
    require(
        type(factor) is int and factor >= 2,
        f"growth by a factor of {factor!r}: it must be an integer of at least 2, every expert "
        "becomes as many",
    )
    require(
        warmup_steps is None or not OPERATORS[operator].widens_choice,
        f"warmup_steps={warmup_steps} goes with growth by 'reserve': the twins of {operator!r} are "
        "chosen from the first step",
    )
    require(
        bool(moe_layers(config)),
        "growth needs MoE layers, and this model has none: upcycle it instead",
    )
    warmup = None if warmup_steps is None else BiasWarmupConfig(steps=warmup_steps, factor=factor)
    pattern = tuple(_grown_layer(spec, operator, factor, warmup) for spec in config.pattern)
    ahead = config.multi_token
    if ahead is not None:
        layer = _grown_layer(ahead.layer, operator, factor, warmup)
        ahead = dataclasses.replace(ahead, layer=layer)
    return dataclasses.replace(config, pattern=pattern, multi_token=ahead)


def _grown_layer(
    spec: LayerSpec, operator: Operator, factor: int, warmup: BiasWarmupConfig | None
) -> LayerSpec:
    if not isinstance(spec.ffn, MoEConfig):
        return spec
    ffn = spec.ffn
    _check(ffn, operator, factor)
    kind = OPERATORS[operator]
    router = dataclasses.replace(ffn.router, warmup=warmup)
    if kind.widens_choice:
        router = dataclasses.replace(
            router,
            top_k=factor * router.top_k,
            num_null_experts=factor * router.num_null_experts,
            target_k=None if router.target_k is None else factor * router.target_k,
            gate_scale=router.gate_scale * _gate_factor(router, kind, factor),
        )
    shared, d_ff = ffn.num_shared_experts, ffn.d_ff
    if kind.cuts_experts:
        shared, d_ff = factor * shared, d_ff // factor
    grown = dataclasses.replace(
        ffn,
        num_experts=factor * ffn.num_experts,
        d_ff=d_ff,
        num_shared_experts=shared,
        router=router,
    )
    return dataclasses.replace(spec, ffn=grown)


def _check(ffn: MoEConfig, operator: Operator, factor: int) -> None:
    router, kind = ffn.router, OPERATORS[operator]
    require(
        router.gates_on == "outputs" and not router.expert_scales,
        "growth is not exact with gates on inputs (router.gates_on) or scales of experts "
        "(router.expert_scales): it is for models without them",
    )
    require(
        ffn.activation != "relu2" and ffn.latent_width is None and ffn.shared_d_ff is None,
        "growth is not built for experts without gates (activation='relu2'), on latent vectors "
        "(latent_width) or beside shared ones of a width of their own (shared_d_ff)",
    )
    require(
        router.choice == "scores",
        "growth has no rows for router.choice='token', whose table names experts by number: it is "
        "for models whose routers choose",
    )
    require(
        router.num_groups is None,
        f"growth by {operator!r} is not exact with router.num_groups={router.num_groups}: a "
        "group's "
        "two best would be twins; leave the groups out first",
    )
    require(
        not kind.cuts_experts or ffn.d_ff % factor == 0,
        f"growth by {operator!r} needs a d_ff divisible by {factor}, got {ffn.d_ff}",
    )
    if kind.widens_choice:
        return
    require(
        router.balance != "none",
        f"growth by {operator!r} needs a router with a bias: set router.balance and "
        "router.bias_rate",
    )
    require(
        router.normalize_gates or not SCORES[router.scores].is_shared,
        f"growth by {operator!r} is not exact with {router.scores} gates that are not "
        "renormalised: the twins would double the denominator",
    )
    require(
        SCORES[router.scores].is_bounded and router.num_null_experts == 0,
        f"growth by {operator!r} needs scores between 0 and 1 and no null experts, whose softmax "
        "share the twins would halve",
    )


def _gate_factor(router: RouterConfig, kind: GrowthKind, factor: int) -> float:
    """By which gates must grow so that a family of twins adds up to its parent.

    Renormalised gates and shared scores (softmax) are divided by the twins' presence; others are
    not.
    """
    is_shared = router.normalize_gates or SCORES[router.scores].is_shared
    wanted = float(factor) if kind.cuts_experts else 1.0
    return wanted if is_shared else wanted / factor


def grow(
    variables: Variables,
    config: ModelConfig,
    operator: Operator,
    factor: int = 2,
    *,
    warmup_steps: int | None = None,
    drop: float = 0.0,
    seed: int = 0,
) -> Variables:
    """The variables of `grown_config(config, operator, factor, warmup_steps)`: the same function of
    every token, but for `drop` under copy.

    Args:
      variables: of a model with this config; arrays anywhere.
      drop: share of each twin's hidden units that are drawn anew, chosen by the seed.
    Raises:
      UserError: as grown_config, or a drop that is no share or has no twin to drop from.
    """
    grown = moe_layers(grown_config(config, operator, factor, warmup_steps))
    require(0 <= drop < 1, f"drop={drop} must lie in [0, 1)")
    require(
        not drop or not OPERATORS[operator].cuts_experts,
        f"drop={drop} goes with 'copy' and 'reserve': experts that are split have no copies",
    )

    def grow_parameter(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = _names(path)
        new = grow_leaf(names, x, operator, factor)
        # Parts of an expert are summed, and each brings its share of the bias.
        is_summed = OPERATORS[operator].cuts_experts and names[-1] == "down_bias"
        return new / factor if is_summed else new

    params = jax.tree_util.tree_map_with_path(grow_parameter, variables["params"])
    if drop:

        def redraw(name: str, layer: MoELayer, moe: Any) -> Any:
            key = jax.random.fold_in(seed_key(seed), sorted(grown).index(name))
            return moe | redraw_units(moe, layer.config.num_experts, drop, key)

        params = map_layers(config, params, redraw)

    def grow_state(name: str, layer: MoELayer, part: Any) -> Any:
        router = layer.config.router
        state = {"state": _grown_state(part["state"], router, operator, factor)}
        new = grown[name]
        if new.config.router.warmup is None:
            return state
        one = initial_warmup(new.config.num_experts, new.config.router.warmup)
        count = (layer.periods,) if layer.periods else ()
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (*count, *x.shape)), one)
        return state | {"warmup": spread}

    states = map_layers(config, variables["router_state"], grow_state)
    return {"params": params, "router_state": states}


def grow_leaf(
    names: tuple[str, ...],
    x: jax.Array,
    operator: Operator,
    factor: int,
    *,
    new_scale: float = 1.0,
) -> jax.Array:
    """The parameter of this path after growth, or a moment of it (train/growth.py).

    Experts lie in the dims that EXPERT_AND_WIDTH names, and in the last dim of whatever makes
    router logits.

    Args:
      new_scale: what the entries of new experts are multiplied by.
    """
    if "moe" not in names or "shared" in names or names[-1] == "shared_gate":
        return x
    leaf = names[-1]
    expert_dim, width_dim = EXPERT_AND_WIDTH.get(leaf, (-1, None))
    if "context" in names and leaf != "o":
        return x
    if OPERATORS[operator].cuts_experts and width_dim is not None:
        return jnp.concatenate(jnp.split(x, factor, axis=width_dim), axis=expert_dim)
    new = x if new_scale == 1.0 else new_scale * x
    return jnp.concatenate([x, *[new] * (factor - 1)], axis=expert_dim)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _grown_state(
    state: RouterState, router: RouterConfig, operator: Operator, factor: int
) -> RouterState:
    """The twins' presence divides every shared score, so the bias beside it is divided too."""
    bias_E = state.bias_E / factor if SCORES[router.scores].is_shared else state.bias_E
    twin_E = bias_E
    if not OPERATORS[operator].widens_choice:
        twin_E = jnp.broadcast_to(bias_E.min(axis=-1, keepdims=True) - RESERVE_GAP, bias_E.shape)
    return state.replace(bias_E=jnp.concatenate([bias_E, *[twin_E] * (factor - 1)], axis=-1))


def redraw_units(moe: dict[str, Any], num_old: int, drop: float, key: jax.Array) -> dict[str, Any]:
    """gate_up, its bias and down with a share of each new expert's hidden units drawn anew.

    One set of units per expert: the same columns of gate and up and rows of down. Each matrix is
    drawn from the normal distribution of the entries it loses.
    """
    gate_up, down = moe["gate_up"], moe["down"]
    units = gate_up.shape[:-3] + gate_up.shape[-1:]  # [..., E, F]
    which_key, *keys = jax.random.split(key, 4)
    rank = jax.random.uniform(which_key, units).argsort(axis=-1).argsort(axis=-1)
    is_lost = rank < round(drop * units[-1])
    leading = (1,) * (len(units) - 2)
    is_lost &= (jnp.arange(units[-2]) >= num_old).reshape(*leading, units[-2], 1)
    columns, rows = is_lost[..., None, :], is_lost[..., :, None]
    gate = _drawn_like(gate_up[..., 0, :], columns, keys[0])
    up = _drawn_like(gate_up[..., 1, :], columns, keys[1])
    new = {"gate_up": jnp.stack([gate, up], axis=-2), "down": _drawn_like(down, rows, keys[2])}
    if "gate_up_bias" in moe:
        halves = jnp.split(moe["gate_up_bias"], 2, axis=-2)  # [..., E, 1, F], one row each
        own = [jax.random.fold_in(key, i) for i in range(2)]
        drawn = [_drawn_like(x, columns, k) for x, k in zip(halves, own, strict=True)]
        new["gate_up_bias"] = jnp.concatenate(drawn, axis=-2)
    return new


def _drawn_like(x: jax.Array, is_lost: jax.Array, key: jax.Array) -> jax.Array:
    """x with its lost entries drawn from their mean and deviation, matrix by matrix."""
    lost = jnp.broadcast_to(is_lost, x.shape)
    moments = {"axis": (-2, -1), "keepdims": True}
    count = jnp.maximum(lost.sum(**moments), 1).astype(x.dtype)
    mean = jnp.where(lost, x, 0.0).sum(**moments) / count
    variance = jnp.where(lost, jnp.square(x - mean), 0.0).sum(**moments) / count
    return jnp.where(lost, mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape), x)
