"""Early exit (CALM, Schuster et al. 2022): a token leaves at the first exit that is sure enough.

Exits lie after each period of the pattern (model.exit_spacing); the last layer's norm and the
output layer read them all. The confidence is softmax's best probability less the second, and the
threshold is one constant (CALM's decaying one starts stricter). Later layers still need the token's
keys and values, for the tokens after it: they are made from the state it left with. Models should
be trained for it, see model/early_exit.py; a threshold with a guarantee comes from
infer/certificate.py.

Two forms of one rule: `exit_step` reads one token through the cache and runs no layer more than the
batch needs; `exit_hidden` judges whole rows at once, for scoring, and saves nothing. Both go
through the layers one by one (infer/layerwise.py).

B rows, L length, D d_model, V vocab.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from configs.checks import require
from configs.feed_forward import MoEConfig
from infer.layerwise import Layer, exit_logits, layers_by_exit, run_layers, stacked
from model.cache import BlockCache, Cache
from model.depth import chosen_by_sign, router_logits
from model.early_exit import exit_layers
from model.transformer import Block, Transformer, Variables, output_weights


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
        config.num_exits >= 2,
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
            "early exit needs depth.selection='threshold': use the config that "
            "model.depth.with_threshold_selection gives",
        )


def exit_step(
    model: Transformer,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
    threshold: float | jax.Array,
) -> ExitStep:
    """Reads one token per row; layers run until all rows are sure.

    A row that is sure before the others keeps its state, so its result does not depend on them.
    A threshold above 1 runs all layers; one of 0 leaves at the first exit.
    """
    check_exits(model)
    positions_B1 = position_B[:, None]
    begun: Any = model.apply(variables, token_B[:, None], positions_B1, cache, method="begin")
    x_B1D, segments_B1, prefix = begun
    w_DV, places = output_weights(model, variables), (positions_B1, segments_B1)
    is_exited_B1, exits_B1 = positions_B1 < 0, jnp.zeros_like(positions_B1)
    logits_BV, new = jnp.zeros((token_B.shape[0], w_DV.shape[1]), jnp.float32), []
    for layers in layers_by_exit(model, variables, cache.periods):

        def run(x_B1D, is_exited_B1, exits_B1, _, caches, layers=layers):
            x_B1D, caches = run_layers(model, layers, caches, x_B1D, *places, is_exited_B1)
            logits_BV = exit_logits(model, variables, x_B1D, w_DV)[:, 0]
            exits_B1 += (~is_exited_B1).astype(jnp.int32)
            is_exited_B1 |= confidence(logits_BV)[:, None] >= threshold
            return x_B1D, is_exited_B1, exits_B1, logits_BV, caches

        def pass_by(x_B1D, is_exited_B1, exits_B1, logits_BV, caches, layers=layers):
            caches = _keys_of(model, layers, caches, x_B1D, *places)
            return x_B1D, is_exited_B1, exits_B1, logits_BV, caches

        state = (x_B1D, is_exited_B1, exits_B1, logits_BV, [layer.cache for layer in layers])
        x_B1D, is_exited_B1, exits_B1, logits_BV, caches = jax.lax.cond(
            is_exited_B1.all(), pass_by, run, *state
        )
        new += caches
    periods = stacked(new, len(model.config.pattern))
    return ExitStep(logits_BV, Cache(prefix, periods), _num_layers(model, exits_B1[:, 0]))


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

    def one_row(x_LD):
        return confidence(exit_logits(model, variables, x_LD[None], w_DV)[0])

    is_exited_BL, exits_BL = positions_BL < 0, jnp.zeros_like(positions_BL)
    for layers in layers_by_exit(model, variables, None):
        no_caches = [None] * len(layers)
        x_BLD, _ = run_layers(
            model, layers, no_caches, x_BLD, positions_BL, segments_BL, is_exited_BL
        )
        exits_BL += (~is_exited_BL).astype(jnp.int32)
        is_exited_BL |= jax.lax.map(one_row, x_BLD) >= threshold
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return hidden_BLD, _num_layers(model, exits_BL)


def confidence(logits_TV: jax.Array) -> jax.Array:
    """The best probability less the second, float32 [T], in [0, 1]."""
    best_T1 = jnp.argmax(logits_TV, axis=-1)[:, None]
    is_best_TV = jax.lax.broadcasted_iota("int32", logits_TV.shape, 1) == best_T1
    p_TV = jax.nn.softmax(logits_TV, axis=-1)
    return p_TV.max(axis=-1) - jnp.where(is_best_TV, 0.0, p_TV).max(axis=-1)


def _keys_of(
    model: Transformer,
    layers: Sequence[Layer],
    caches: Sequence[BlockCache],
    x_B1D: jax.Array,
    positions_B1: jax.Array,
    segments_B1: jax.Array,
) -> list[BlockCache]:
    """The caches of layers that are passed by, by tokens with this state.

    Only norm, keys, values and the write are computed: nobody reads the rest of the blocks, so XLA
    leaves it out. A layer that chooses its tokens chooses here too.
    """
    new = []
    for layer, cache in zip(layers, caches, strict=True):
        keys_at_B1, variables = positions_B1, layer.variables()
        if layer.spec.depth is not None:
            r_B1 = router_logits(variables["params"]["depth_router"], x_B1D)
            keys_at_B1 = jnp.where(chosen_by_sign(r_B1, positions_B1), positions_B1, -1)
        spec = dataclasses.replace(layer.spec, depth=None)
        block = Block(spec, model.config, model.execution)
        applied: Any = block.apply(variables, x_B1D, keys_at_B1, segments_B1, cache)
        new.append(applied[1])
    return new


def _num_layers(model: Transformer, exits: jax.Array) -> jax.Array:
    """Layers before the last of so many exits; 0 for padding, which goes through none."""
    layers_P = jnp.asarray(exit_layers(model.config), jnp.int32) + 1
    return jnp.where(exits > 0, layers_P[jnp.maximum(exits - 1, 0)], 0)
