"""Early exit (CALM, Schuster et al. 2022): a token leaves at the first exit that is sure enough.

Exits lie after each period of the pattern (model.exit_spacing); the last layer's norm and the
output layer read them all. The confidence is softmax's best probability less the second, and the
threshold is one constant (CALM's decaying one starts stricter). Later layers still need the token's
keys and values, for the tokens after it: they are made from the state it left with. Models should
be trained for it, see model/early_exit.py; a threshold with a guarantee comes from
infer/certificate.py.

Two forms of one rule: `exit_step` reads one token through the state and runs no layer more than the
batch needs; `exit_hidden` judges whole rows at once, for scoring, and saves nothing. Both want a
model whose layers lie apart (model/unstacked.py).

B rows, L length, D d_model, V vocab.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from configs.architecture import ModelConfig
from configs.checks import require
from configs.feed_forward import MoEConfig
from model.early_exit import exit_layers
from model.layers import unembed
from model.model_state import ModelState
from model.step import Step, make_step
from model.transformer import Transformer, Variables, output_weights


class ExitStep(NamedTuple):
    logits_BV: jax.Array
    """float32, of the exit each row took."""
    state: ModelState
    layers_B: jax.Array
    """Layers the row's token went through, int32."""


def check_exits(model: Transformer) -> None:
    """
    Raises:
      UserError: the model has no exit before its end, or layers that can't be skipped.
    """
    config = model.config
    reason = unexitable_reason(config)
    require(reason is None, f"{reason}")
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


def unexitable_reason(config: ModelConfig) -> str | None:
    """Why a model's layers can't run a few at a time, in a sentence; None: they can."""
    if config.has_shared_keys or config.per_layer_embeddings is not None:
        return (
            "early exits and drafts by a model's own first layers are not built for layers that "
            "read the keys of others (shares_keys, shares_indexer) or vectors of their own "
            "(per_layer_embeddings): generate without them"
        )
    return None


def exit_step(
    model: Transformer,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    state: ModelState,
    threshold: float | jax.Array,
) -> ExitStep:
    """Reads one token per row; layers run until all rows are sure.

    A row that is sure before the others keeps its state, so its result does not depend on them.
    A threshold above 1 runs all layers; one of 0 leaves at the first exit.
    """
    check_exits(model)
    step = make_step(token_B[:, None], position_B[:, None])
    x_B1D, state = begin(model, variables, step, state)
    w_DV = output_weights(model, variables, as_stored=True)
    is_exited_B1, exits_B1 = step.positions_BL < 0, jnp.zeros_like(step.positions_BL)
    logits_BV = jnp.zeros((token_B.shape[0], model.config.vocab_size), jnp.float32)
    for layers in exit_ranges(model):
        part = step.replace(layers=layers)

        def run(x_B1D, is_exited_B1, exits_B1, _, state, part=part):
            part = part.replace(is_exited_BL=is_exited_B1)
            x_B1D, state = run_layers(model, variables, x_B1D, part, state)
            logits_BV = exit_logits(model, variables, x_B1D, w_DV)[:, 0]
            exits_B1 += (~is_exited_B1).astype(jnp.int32)
            is_exited_B1 |= confidence(logits_BV)[:, None] >= threshold
            return x_B1D, is_exited_B1, exits_B1, logits_BV, state

        def pass_by(x_B1D, is_exited_B1, exits_B1, logits_BV, state, part=part):
            # Nobody reads x after these layers, so XLA leaves out all but norms, keys and values.
            part = part.replace(is_exited_BL=jnp.ones_like(is_exited_B1))
            _, state = run_layers(model, variables, x_B1D, part, state)
            return x_B1D, is_exited_B1, exits_B1, logits_BV, state

        operands = (x_B1D, is_exited_B1, exits_B1, logits_BV, state)
        x_B1D, is_exited_B1, exits_B1, logits_BV, state = jax.lax.cond(
            is_exited_B1.all(), pass_by, run, *operands
        )
    return ExitStep(logits_BV, state, _num_layers(model, exits_B1[:, 0]))


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
    step = make_step(tokens_BL, positions_BL)
    x_BLD, _ = begin(model, variables, step, None)
    w_DV = output_weights(model, variables, as_stored=True)

    def row_confidence(x_LD):
        return confidence(exit_logits(model, variables, x_LD[None], w_DV)[0])

    is_exited_BL, exits_BL = positions_BL < 0, jnp.zeros_like(positions_BL)
    for layers in exit_ranges(model):
        part = step.replace(layers=layers, is_exited_BL=is_exited_BL)
        x_BLD, _ = run_layers(model, variables, x_BLD, part, None)
        exits_BL += (~is_exited_BL).astype(jnp.int32)
        is_exited_BL |= jax.lax.map(row_confidence, x_BLD) >= threshold
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return hidden_BLD, _num_layers(model, exits_BL)


def confidence(logits_TV: jax.Array) -> jax.Array:
    """The best probability less the second, float32 [T], in [0, 1]."""
    best_T1 = jnp.argmax(logits_TV, axis=-1)[:, None]
    is_best_TV = jax.lax.broadcasted_iota("int32", logits_TV.shape, 1) == best_T1
    p_TV = jax.nn.softmax(logits_TV, axis=-1)
    return p_TV.max(axis=-1) - jnp.where(is_best_TV, 0.0, p_TV).max(axis=-1)


def exit_ranges(model: Transformer) -> list[tuple[int, int]]:
    """The layers of the pattern between exits, for a model whose layers lie apart.

    Raises:
      ValueError: a model that repeats its pattern.
    """
    config = model.config
    if config.num_periods > 1:
        raise ValueError("exits lie between layers that lie apart: unstack the model")
    spacing = len(config.pattern) // config.num_exits
    return [(first, first + spacing) for first in range(0, len(config.pattern), spacing)]


def begin(
    model: Transformer, variables: Variables, step: Step, state: ModelState | None
) -> tuple[jax.Array, Any]:
    """See Transformer.begin; of a model whose layers get nothing beside."""
    x_BLD, state, _ = cast(Any, model.apply(variables, step, state, method="begin"))
    return x_BLD, state


def run_layers(
    model: Transformer,
    variables: Variables,
    x_BLD: jax.Array,
    step: Step,
    state: ModelState | None,
) -> tuple[jax.Array, Any]:
    """x and the state after step.layers: see Transformer.run_periods."""
    return cast(Any, model.apply(variables, x_BLD, step, state, method="run_periods"))


def exit_logits(model: Transformer, variables: Variables, x_BLD: jax.Array, w_DV: Any) -> jax.Array:
    """What the model says from a state before, at or after an exit, float32 [B, L, V]."""
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return unembed(hidden_BLD, w_DV)


def _num_layers(model: Transformer, exits: jax.Array) -> jax.Array:
    """Layers before the last of so many exits; 0 for padding, which goes through none."""
    layers_P = jnp.asarray(exit_layers(model.config), jnp.int32) + 1
    return jnp.where(exits > 0, layers_P[jnp.maximum(exits - 1, 0)], 0)
