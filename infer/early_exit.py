"""Early exit (CALM, Schuster et al. 2022): a token leaves at the first exit that is sure enough.

Exits lie after each period of the pattern; the last layer's norm and the output layer read them
all. The confidence is softmax's best probability less the second, and the threshold is one constant
(CALM's decaying one starts stricter). Later layers still need the token's keys and values, for the
tokens after it: they are made from the state it left with. Models should be trained for it, see
model/early_exit.py; a threshold with a guarantee comes from infer/certificate.py.

Two forms of one rule: `exit_step` reads one token through the cache and runs no layer more than the
batch needs; `exit_hidden` judges whole rows at once, for scoring, and saves nothing.

B rows, L length, D d_model, V vocab, P periods.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from configs.architecture import MoEConfig
from configs.checks import require
from model.cache import BlockCache, Cache
from model.depth import chosen_by_sign, router_logits
from model.early_exit import exit_layers
from model.transformer import Block, Transformer, Variables, output_weights

Caches = tuple[BlockCache | None, ...]


class ExitStep(NamedTuple):
    logits_BV: jax.Array
    """float32, of the exit each row took."""
    cache: Cache
    layers_B: jax.Array
    """Layers the row's token went through, int32."""


def check_exits(model: Transformer) -> None:
    """
    Raises:
      UserError: the model has no exit before its end, or layers that can't be skipped.
    """
    config = model.config
    require(
        config.num_periods >= 2,
        "exit_threshold has no effect on a model of one period: exits lie between periods",
    )
    for spec in config.pattern:
        context = spec.ffn.router.context if isinstance(spec.ffn, MoEConfig) else None
        require(
            context is None or context.kind != "causal",
            "early exit can't skip a layer whose router sees the context: its cache needs that "
            "layer's attention; use a model without router.context",
        )
        require(
            spec.depth is None or spec.depth.selection == "threshold",
            "early exit needs depth.selection='threshold': use the config that model.depth.causal "
            "gives",
        )


def exit_step(
    model: Transformer,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
    threshold: float | jax.Array,
) -> ExitStep:
    """Reads one token per row; periods run until all rows are sure.

    A row that is sure before the others keeps its state, so its result does not depend on them.
    A threshold above 1 runs all layers; one of 0 leaves at the first exit.
    """
    check_exits(model)
    positions_B1, num_periods = position_B[:, None], model.config.num_periods
    begun: Any = model.apply(variables, token_B[:, None], positions_B1, cache, method="begin")
    x_B1D, segments_B1, prefix = begun
    stacked, w_DV = _stacked_layers(variables), output_weights(model, variables)

    def goes_on(carry):
        i, _, _, is_exited_B1, _, _ = carry
        return (i < num_periods) & ~is_exited_B1.all()

    def run(carry):
        i, x_B1D, caches, is_exited_B1, periods_B1, _ = carry
        x_B1D, new = _run_period(
            model, _at(stacked, i), x_B1D, _at(caches, i), positions_B1, segments_B1, is_exited_B1
        )
        logits_BV = _logits(model, variables, x_B1D, w_DV)[:, 0]
        periods_B1 += (~is_exited_B1).astype(jnp.int32)
        is_exited_B1 |= confidence(logits_BV)[:, None] >= threshold
        return i + 1, x_B1D, _put(caches, new, i), is_exited_B1, periods_B1, logits_BV

    def fill(i, carry):
        x_B1D, caches = carry
        new = _keys_of(model, _at(stacked, i), x_B1D, _at(caches, i), positions_B1, segments_B1)
        return x_B1D, _put(caches, new, i)

    shape = (token_B.shape[0], w_DV.shape[1])
    start = (jnp.int32(0), x_B1D, cache.periods, positions_B1 < 0)
    start = (*start, jnp.zeros_like(positions_B1), jnp.zeros(shape, jnp.float32))
    i, x_B1D, caches, _, periods_B1, logits_BV = jax.lax.while_loop(goes_on, run, start)
    _, caches = jax.lax.fori_loop(i, num_periods, fill, (x_B1D, caches))
    return ExitStep(logits_BV, Cache(prefix, caches), _num_layers(model, periods_B1[:, 0]))


def exit_hidden(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    threshold: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """hidden_BLD of the exit that each token takes, and the layers it went through, int32 [B, L].

    Every layer runs on every token; where a token has left, its state stays.
    """
    check_exits(model)
    begun: Any = model.apply(variables, tokens_BL, positions_BL, None, method="begin")
    x_BLD, segments_BL, _ = begun
    w_DV = output_weights(model, variables)
    no_caches: Caches = (None,) * len(model.config.pattern)

    def one_row(x_LD):
        return confidence(_logits(model, variables, x_LD[None], w_DV)[0])

    def run(carry, layers):
        x_BLD, is_exited_BL, periods_BL = carry
        x_BLD, _ = _run_period(
            model, layers, x_BLD, no_caches, positions_BL, segments_BL, is_exited_BL
        )
        periods_BL += (~is_exited_BL).astype(jnp.int32)
        is_exited_BL |= jax.lax.map(one_row, x_BLD) >= threshold
        return (x_BLD, is_exited_BL, periods_BL), None

    is_padding_BL = positions_BL < 0
    start = (x_BLD, is_padding_BL, jnp.zeros(is_padding_BL.shape, jnp.int32))
    (x_BLD, _, periods_BL), _ = jax.lax.scan(run, start, _stacked_layers(variables))
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return hidden_BLD, _num_layers(model, periods_BL)


def confidence(logits_TV: jax.Array) -> jax.Array:
    """The best probability less the second, float32 [T], in [0, 1]."""
    best_T2, _ = jax.lax.top_k(jax.nn.softmax(logits_TV, axis=-1), 2)
    return best_T2[:, 0] - best_T2[:, 1]


def _run_period(
    model: Transformer,
    layers: Any,
    x_BLD: jax.Array,
    caches: Caches,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    is_exited_BL: jax.Array,
) -> tuple[jax.Array, Caches]:
    """One period; tokens that have left keep their state, of which each layer makes their keys."""
    new = []
    for i, spec in enumerate(model.config.pattern):
        block = Block(spec, model.config, model.execution)
        applied: Any = block.apply(layers[i], x_BLD, positions_BL, segments_BL, caches[i])
        after_BLD, cache = applied
        x_BLD = jnp.where(is_exited_BL[:, :, None], x_BLD, after_BLD)
        new.append(cache)
    return x_BLD, tuple(new)


def _keys_of(
    model: Transformer,
    layers: Any,
    x_B1D: jax.Array,
    caches: Caches,
    positions_B1: jax.Array,
    segments_B1: jax.Array,
) -> Caches:
    """The caches of a period that is skipped by tokens with this state.

    Only norm, keys, values and the write are computed: nobody reads the rest of the blocks, so XLA
    leaves it out. A layer that chooses its tokens chooses here too.
    """
    new = []
    for i, spec in enumerate(model.config.pattern):
        keys_at_B1 = positions_B1
        if spec.depth is not None:
            r_B1 = router_logits(layers[i]["params"]["depth_router"], x_B1D)
            keys_at_B1 = jnp.where(chosen_by_sign(r_B1, positions_B1), positions_B1, -1)
        block = Block(dataclasses.replace(spec, depth=None), model.config, model.execution)
        applied: Any = block.apply(layers[i], x_B1D, keys_at_B1, segments_B1, caches[i])
        new.append(applied[1])
    return tuple(new)


def _stacked_layers(variables: Variables) -> tuple[Variables, ...]:
    """Variables of each layer of the pattern, stacked over the periods in dim 0."""
    params = variables["params"]["periods"]
    states = variables["router_state"].get("periods", {})
    return tuple(
        {"params": params[f"layer_{i}"], "router_state": states.get(f"layer_{i}", {})}
        for i in range(len(params))
    )


def _logits(
    model: Transformer, variables: Variables, x_BLD: jax.Array, w_DV: jax.Array
) -> jax.Array:
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return jnp.einsum("BLD,DV->BLV", hidden_BLD, w_DV, preferred_element_type=jnp.float32)


def _num_layers(model: Transformer, periods: jax.Array) -> jax.Array:
    """Layers before the exit after so many periods; 0 for padding, which goes through none."""
    layers_P = jnp.asarray(exit_layers(model.config), jnp.int32) + 1
    return jnp.where(periods > 0, layers_P[jnp.maximum(periods - 1, 0)], 0)


def _at(stacked: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)


def _put(stacked: Any, new: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: x.at[i].set(y), stacked, new)
