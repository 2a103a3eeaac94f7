"""The programs of generation: a piece of a prompt is read, or each sequence gets its next token.

R rows (sequences), L tokens of a piece, D d_model, V vocab.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from infer.early_exit import exit_step
from infer.self_speculative import Draft, Verified, draft_and_verify
from model.layers import unembed
from model.model_state import (
    ModelState,
    init_state,
    put_rows,
    rewind,
    state_axes,
    take_rows,
    with_pages_of,
)
from model.step import ChosenExperts, Preference, Step, make_step
from model.transformer import (
    Transformer,
    Variables,
    forward,
    forward_and_experts,
    output_weights,
)
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


def run(
    model: Transformer, variables: Variables, step: Step, state: ModelState, with_experts: bool
) -> tuple[jax.Array, ModelState, ChosenExperts | None]:
    """Hidden states, the state with the tokens added and, where asked, the experts of each token
    (int32 [periods, B, L, K] by MoE layer)."""
    if with_experts:
        return cast(Any, forward_and_experts(model, variables, step, state))
    return *cast(Any, forward(model, variables, step, state)), None


class Pieces(NamedTuple):
    """Pieces of several prompts one after the other, in numpy: what a program reads of them."""

    tokens_1T: Any
    """int32."""
    positions_1T: Any
    """int32; -1: padding."""
    rows_1T: Any
    """int32, the row of the state of each token's sequence."""
    length_R: Any
    """int32, the tokens that each of these rows holds before; more than any for other rows."""
    last_R: Any
    """int32, where each row's last token lies; -1 for rows without."""


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def read_mixed(
    model: Transformer,
    variables: Variables,
    pieces: Pieces,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
    with_experts: bool = False,
) -> tuple[jax.Array, jax.Array, ModelState, ChosenExperts | None]:
    """Reads pieces of prompts in one row of tokens: hidden states of all of them [T, D], of each
    row's last [R, D], the state, and where asked the tokens' experts. For models whose layers take
    tokens of several sequences.
    """
    step, state = begin_mixed(pieces, state, tables_RN, preference)
    hidden_1TD, state, chosen = run(model, variables, step, state, with_experts)
    return *end_mixed(hidden_1TD, pieces), laid_out(state), chosen


def begin_mixed(
    pieces: Pieces,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
) -> tuple[Step, ModelState]:
    """What the model reads of pieces, and the state without what their rows held of others."""
    step = make_step(
        pieces.tokens_1T,
        pieces.positions_1T,
        rows_BL=pieces.rows_1T,
        tables_RN=tables_RN,
        preference=preference,
    )
    return step, rewind(state, pieces.length_R)


def end_mixed(hidden_1TD: jax.Array, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    """Hidden states of all tokens [T, D], and of each row's last [R, D]."""
    hidden_TD, last_R1 = hidden_1TD[0], pieces.last_R[:, None]
    return hidden_TD, jnp.where(last_R1 >= 0, hidden_TD[jnp.maximum(pieces.last_R, 0)], 0)


@partial(jax.jit, static_argnums=(0, 1, 10), donate_argnums=7)
def read_rows(
    model: Transformer,
    size: StateSize,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    rows_B: jax.Array,
    is_first_B: jax.Array,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
    with_experts: bool = False,
) -> tuple[jax.Array, jax.Array, ModelState, ChosenExperts | None]:
    """As `read_mixed`, each piece in a row of tokens of its own: hidden states [B * L, D] and of
    each row's last [R, D], the state, and where asked the experts.

    Args:
      size: of the state.
      rows_B: int32, the row of the state that each piece's sequence has; R for no piece.
      is_first_B: the piece begins the sequence: what its row held before is forgotten.
    """
    places = (rows_B, is_first_B, state, tables_RN, preference)
    step, own = begin_rows(model, size, tokens_BL, positions_BL, *places)
    hidden_BLD, own, chosen = run(model, variables, step, own, with_experts)
    return *end_rows(size, hidden_BLD, positions_BL, rows_B, state, own), chosen


def begin_rows(
    model: Transformer,
    size: StateSize,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    rows_B: jax.Array,
    is_first_B: jax.Array,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
) -> tuple[Step, ModelState]:
    """What the model reads of pieces in rows of their own, and the state of these rows alone."""
    num, at_B = len(rows_B), jnp.minimum(rows_B, size.num_rows - 1)
    own = take_rows(state, at_B)
    empty = _empty(model, size._replace(num_rows=num))
    own = put_rows(own, jnp.where(is_first_B, jnp.arange(num), num), empty)
    if preference is not None:
        preference = {name: x[:, at_B] for name, x in preference.items()}
    tables_BN = None if tables_RN is None else tables_RN[at_B]
    return make_step(tokens_BL, positions_BL, tables_RN=tables_BN, preference=preference), own


def end_rows(
    size: StateSize,
    hidden_BLD: jax.Array,
    positions_BL: jax.Array,
    rows_B: jax.Array,
    state: ModelState,
    own: ModelState,
) -> tuple[jax.Array, jax.Array, ModelState]:
    """Hidden states of all tokens [B * L, D], of each row's last [R, D], and the state with that
    of these rows in it."""
    state = with_pages_of(put_rows(state, rows_B, own), own)
    last_B1 = jnp.argmax(positions_BL, axis=1, keepdims=True)
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B1[:, :, None], axis=1)[:, 0]
    hidden_RD = jnp.zeros((size.num_rows, hidden_BD.shape[1]), hidden_BD.dtype)
    hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
    return hidden_TD, hidden_RD.at[rows_B].set(hidden_BD, mode="drop"), laid_out(state)


def read_prompts(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    state: ModelState,
) -> tuple[jax.Array, ModelState]:
    """Reads whole prompts side by side; the most likely token after each, int32 [B], and the state.

    The engine reads them in pieces; a step of this form is what the planner plans.
    """
    step = make_step(tokens_BL, positions_BL, is_whole=True)
    hidden_BLD, state = cast(Any, forward(model, variables, step, state))
    last_B1 = jnp.argmax(positions_BL, axis=1, keepdims=True)
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B1[:, :, None], axis=1)[:, 0]
    return jnp.argmax(_logits(model, variables, hidden_BD), axis=-1), laid_out(state)


@partial(jax.jit, static_argnums=0)
def logits_of(model: Transformer, variables: Variables, hidden_RD: jax.Array) -> jax.Array:
    """What the model says after hidden states, float32 [R, V]."""
    return _logits(model, variables, hidden_RD)


@jax.jit
def best_of(logits_RV: jax.Array) -> jax.Array:
    """The most likely token of each row, int32 [R]."""
    return jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 7), donate_argnums=4)
def decode(
    model: Transformer,
    variables: Variables,
    token_R: jax.Array,
    position_R: jax.Array,
    state: ModelState,
    tables_RN: jax.Array | None,
    preference: Preference | None,
    with_experts: bool = False,
) -> tuple[jax.Array, ModelState, ChosenExperts | None]:
    """Reads one token per row; float32 logits of the next one, [R, V], the state, and where asked
    the experts.

    Args:
      token_R: int32, the newest token.
      position_R: int32, its place; -1 for a row that does nothing.
      tables_RN: pages of each row; None for a state without pages.
    """
    step = begin_decode(token_R, position_R, tables_RN, preference)
    hidden_R1D, new_state, chosen = run(model, variables, step, state, with_experts)
    return _logits(model, variables, hidden_R1D[:, 0]), laid_out(new_state), chosen


def begin_decode(
    token_R: jax.Array,
    position_R: jax.Array,
    tables_RN: jax.Array | None,
    preference: Preference | None,
) -> Step:
    """What the model reads of each row's newest token."""
    return make_step(
        token_R[:, None], position_R[:, None], tables_RN=tables_RN, preference=preference
    )


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


def _logits(model: Transformer, variables: Variables, hidden_BD: jax.Array) -> jax.Array:
    return unembed(hidden_BD, output_weights(model, variables, as_stored=True))
