"""The programs of generation: a piece of a prompt is read, or each sequence gets its next token.

R rows (sequences), L tokens of a piece, D d_model, V vocab.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from infer.early_exit import exit_step
from infer.sampling import SamplingRows, TokenCounts, sample
from infer.self_speculative import Draft, Verified, draft_and_verify
from model.layers import unembed
from model.model_state import ModelState, init_state, put_rows, state_axes, take_rows
from model.step import Preference, make_step
from model.transformer import Transformer, Variables, forward, output_weights
from parallel.sharding import constrain


class StateSize(NamedTuple):
    """What `init_state` is asked for."""

    num_rows: int
    max_length: int
    dtype: str
    spare: int = 0
    num_pages: int | None = None
    page_size: int = 64


@partial(jax.jit, static_argnums=(0, 1))
def empty_state(model: Transformer, size: StateSize) -> ModelState:
    """The state of sequences that have not begun, laid out over the mesh in use."""
    return laid_out(_empty(model, size))


def _empty(model: Transformer, size: StateSize) -> ModelState:
    return init_state(
        model.config,
        size.num_rows,
        size.max_length,
        size.dtype,
        size.spare,
        num_pages=size.num_pages,
        page_size=size.page_size,
    )


def laid_out(state: ModelState) -> ModelState:
    """The state with every array where the mesh in use wants it; a layout, never a value."""
    axes = state_axes(state)
    flat, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(
        tree,
        [constrain(x, *names) for x, names in zip(flat, tree.flatten_up_to(axes), strict=True)],
    )


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def read_piece(
    model: Transformer,
    size: StateSize,
    is_whole: bool,
    variables: Variables,
    tokens_1L: jax.Array,
    positions_1L: jax.Array,
    row_1: jax.Array,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
) -> tuple[jax.Array, ModelState]:
    """Reads the next tokens of one sequence; the state of the last of them, [1, D].

    Args:
      size: of the state.
      is_whole: the tokens begin the sequence: what its row held before is forgotten.
      row_1: the row of the state it has.
    """
    is_paged = size.num_pages is not None
    step = make_step(
        tokens_1L,
        positions_1L,
        rows_BL=jnp.broadcast_to(row_1[:, None], tokens_1L.shape) if is_paged else None,
        tables_RN=tables_RN,
        preference=preference,
        is_whole=is_whole and tokens_1L.shape[1] > 1,
    )
    if is_paged:
        hidden_1LD, state = cast(Any, forward(model, variables, step, state))
    else:
        own = _empty(model, size._replace(num_rows=1)) if is_whole else take_rows(state, row_1)
        hidden_1LD, own = cast(Any, forward(model, variables, step, own))
        state = put_rows(state, row_1, own)
    last_11 = jnp.argmax(positions_1L, axis=1, keepdims=True)
    hidden_1D = jnp.take_along_axis(hidden_1LD, last_11[:, :, None], axis=1)[:, 0]
    return hidden_1D, laid_out(state)


def read_prompts(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    state: ModelState,
) -> tuple[jax.Array, ModelState]:
    """Reads whole prompts side by side; the most likely token after each, int32 [B], and the state.

    The engine reads prompts one by one; a step of this form is what the planner plans.
    """
    step = make_step(tokens_BL, positions_BL, is_whole=True)
    hidden_BLD, state = cast(Any, forward(model, variables, step, state))
    last_B1 = jnp.argmax(positions_BL, axis=1, keepdims=True)
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B1[:, :, None], axis=1)[:, 0]
    return jnp.argmax(_logits(model, variables, hidden_BD), axis=-1), laid_out(state)


@partial(jax.jit, static_argnums=(0, 1))
def prompt_logits(
    model: Transformer, num_rows: int, variables: Variables, hidden_1D: jax.Array, row: jax.Array
) -> jax.Array:
    """The logits after a prompt whose last token left this state, in its row of [R, V]; zeros in
    the others."""
    logits_1V = _logits(model, variables, hidden_1D)
    logits_RV = jnp.zeros((num_rows, logits_1V.shape[1]), jnp.float32)
    return logits_RV.at[row].set(logits_1V[0])


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def decode(
    model: Transformer,
    variables: Variables,
    token_R: jax.Array,
    position_R: jax.Array,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
) -> tuple[jax.Array, ModelState]:
    """Reads one token per row; float32 logits of the next one, [R, V], and the state.

    Args:
      token_R: int32, the newest token.
      position_R: int32, its place; -1 for a row that does nothing.
      tables_RN: pages of each row; None for a state without pages.
    """
    step = make_step(
        token_R[:, None], position_R[:, None], tables_RN=tables_RN, preference=preference
    )
    hidden_R1D, new_state = cast(Any, forward(model, variables, step, state))
    return _logits(model, variables, hidden_R1D[:, 0]), laid_out(new_state)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def decode_early(
    model: Transformer,
    variables: Variables,
    token_R: jax.Array,
    position_R: jax.Array,
    state: ModelState,
    threshold: float,
) -> tuple[jax.Array, ModelState, jax.Array]:
    """As `decode`, leaving at the first exit that is sure enough; and the layers run, [R]."""
    made = exit_step(model, variables, token_R, position_R, state, threshold)
    return made.logits_BV, made.state, made.layers_B


@partial(jax.jit, static_argnums=(0, 2), donate_argnums=5)
def decode_draft(
    model: Transformer,
    variables: Variables,
    draft: Draft,
    token_R: jax.Array,
    position_R: jax.Array,
    state: ModelState,
) -> Verified:
    return draft_and_verify(model, variables, token_R, position_R, state, draft)


@partial(jax.jit, donate_argnums=2)
def choose(
    logits_RV: jax.Array,
    sampling: SamplingRows,
    counts: TokenCounts,
    position_R: jax.Array,
    is_live_R: jax.Array,
) -> tuple[jax.Array, TokenCounts]:
    """The next token of each row, int32 [R], and the counts with those of the live rows.

    Args:
      position_R: of the token before: each position has a draw of its own.
    """
    token_R = sample(logits_RV, sampling, counts, position_R)
    row_R, more_R = jnp.arange(len(token_R)), is_live_R.astype(jnp.int32)
    return token_R, counts.replace(generated_BV=counts.generated_BV.at[row_R, token_R].add(more_R))


@partial(jax.jit, donate_argnums=0)
def begin_counts(counts: TokenCounts, row: jax.Array, is_prompt_V: jax.Array) -> TokenCounts:
    """The counts with a row begun anew: its prompt holds these tokens, its text none."""
    return TokenCounts(
        counts.generated_BV.at[row].set(0), counts.is_prompt_BV.at[row].set(is_prompt_V)
    )


def _logits(model: Transformer, variables: Variables, hidden_BD: jax.Array) -> jax.Array:
    return unembed(hidden_BD, output_weights(model, variables, as_stored=True))
