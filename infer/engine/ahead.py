"""Drafts by the model's own multi-token module (DeepSeek-V3, 2024, section 2.2).

The module reads what the model gave at a place and the token that follows, and says the token after
that; of its own result and that token it says one more. It keeps keys of the places that it has
read: those of the prompt that the model read, and of the text. Places that it missed (a prefix from
the cache, steps without drafts) it does without: its text begins after them. A draft is certain, so
that the model's own draws decide (infer/speculative.py): the text is the model's.

R rows (sequences), N places of a row, T tokens of a program, D d_model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from infer import steps
from infer.engine.routed import Span
from infer.engine.sequence import TokenSequence
from infer.mtp_draft import MtpDraft
from infer.steps import StateSize
from model.layers import unembed
from model.model_state import ModelState, ahead_config, rewind
from model.step import make_step
from model.transformer import Transformer, Variables, output_weights

UNTOUCHED = np.iinfo(np.int32).max


class MtpDrafter:
    """The module's state, a row for each of the engine's, and what the model last gave.

    Args:
      width: tokens of the widest program that reads prompts.
    """

    def __init__(
        self,
        draft: MtpDraft,
        model: Transformer,
        variables: Variables,
        num_rows: int,
        max_length: int,
        width: int,
    ) -> None:
        self._draft, self._model, self._variables = draft, model, variables
        self._rows, places = num_rows, 1 + draft.length
        dtype = model.execution.compute_dtype
        alone = Transformer(ahead_config(model.config), model.execution)
        spare = max(places, width - 1)
        self._state = steps.empty_state(
            alone, StateSize(num_rows, max_length + places, dtype, spare)
        )
        shape = (num_rows, places, model.config.d_model)
        self._hidden_RND = jnp.zeros(shape, jnp.dtype(dtype))
        self._next_RN = np.zeros((num_rows, places), np.int32)
        self._owner_R = np.full(num_rows, -1)
        """By number of the request: whose tokens the model last read."""
        self._place_R, self._count_R = np.zeros(num_rows, int), np.zeros(num_rows, int)
        """Where in the sequence these are, and how many."""
        self._spans: dict[int, tuple[int, int, int]] = {}
        """By row: whose places the state holds, the first one and the one behind the last."""

    def read(self, hidden_TD: jax.Array, spans: Sequence[Span]) -> None:
        """The model has read these tokens of prompts, in one row of a program."""
        width, is_empty = len(hidden_TD), True
        next_1T, rows_1T = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
        positions_1T = np.full((1, width), -1, np.int32)
        length_R = np.full(self._rows, UNTOUCHED, np.int32)
        for span in spans:
            sequence = span.sequence
            count = min(span.count, len(sequence.prompt) - 1 - span.begin)
            if count <= 0:
                continue
            first = self._go_on(sequence, span.begin, count)
            at, is_empty = slice(span.at, span.at + count), False
            next_1T[0, at] = sequence.prompt[span.begin + 1 : span.begin + 1 + count]
            positions_1T[0, at] = np.arange(span.begin, span.begin + count) - first
            rows_1T[0, at], length_R[sequence.row] = sequence.row, span.begin - first
        if not is_empty:
            self._run_read(hidden_TD, next_1T, positions_1T, rows_1T, length_R)

    def note(
        self, hidden_RLD: jax.Array, given: Sequence[tuple[TokenSequence, int, list[int]]]
    ) -> None:
        """What the model gave at a few places of some sequences.

        Args:
          hidden_RLD: of each row, L of 1 or N; [R, D] of one place.
          given: the sequence, the first place, and the token that follows each place.
        """
        is_row_R = np.zeros(self._rows, bool)
        for sequence, place, following in given:
            row = sequence.row
            is_row_R[row] = True
            self._owner_R[row], self._place_R[row] = sequence.number, place
            self._count_R[row] = len(following)
            self._next_RN[row, : len(following)] = following
        self._hidden_RND = _kept(self._hidden_RND, hidden_RLD, is_row_R)

    def propose(self, wanted: Sequence[TokenSequence]) -> dict[TokenSequence, list[int]]:
        """What follows the newest token of each, where the model was noted to have given it."""
        positions_RN = np.full(self._next_RN.shape, -1, np.int32)
        fresh = [s for s in wanted if self._is_fresh(s)]
        if not fresh:
            return {}
        for sequence in fresh:
            row = sequence.row
            place, count = int(self._place_R[row]), int(self._count_R[row])
            first = self._go_on(sequence, place, count)
            positions_RN[row, :count] = np.arange(place, place + count) - first
        drafts_RN = self._run(positions_RN)
        return {s: drafts_RN[s.row].tolist() for s in fresh}

    def warm_up(self, widths: Sequence[int]) -> None:
        """Runs all its programs with nothing to read."""
        no_row_R = np.zeros(self._rows, bool)
        rows, places, d_model = self._hidden_RND.shape
        for shape in ((rows, d_model), (rows, 1, d_model), (rows, places, d_model)):
            none = jnp.zeros(shape, self._hidden_RND.dtype)
            self._hidden_RND = _kept(self._hidden_RND, none, no_row_R)
        self._run(np.full(self._next_RN.shape, -1, np.int32))
        for width in widths:
            hidden_TD = jnp.zeros((width, self._hidden_RND.shape[-1]), self._hidden_RND.dtype)
            none_1T = np.zeros((1, width), np.int32)
            length_R = np.full(self._rows, UNTOUCHED, np.int32)
            self._run_read(hidden_TD, none_1T, none_1T - 1, none_1T, length_R)

    def _is_fresh(self, sequence: TokenSequence) -> bool:
        row = sequence.row
        end = self._place_R[row] + self._count_R[row]
        return self._owner_R[row] == sequence.number and end == sequence.known - 1

    def _go_on(self, sequence: TokenSequence, begin: int, count: int) -> int:
        """Takes up places of a sequence; the first one that its row's state holds."""
        owner, first, end = self._spans.get(sequence.row, (-1, 0, 0))
        if owner != sequence.number or not first <= begin <= end:
            first = begin
        self._spans[sequence.row] = (sequence.number, first, begin + count)
        return first

    def _run(self, positions_RN: np.ndarray) -> np.ndarray:
        model, variables, length = self._model, self._variables, self._draft.length
        inputs = (self._hidden_RND, self._next_RN.copy(), positions_RN, self._state)
        drafts_RN, self._state = _propose(model, length, variables, *inputs)
        return np.asarray(drafts_RN)

    def _run_read(self, hidden_TD: jax.Array, *arrays: np.ndarray) -> None:
        self._state = _read(self._model, self._variables, hidden_TD, *arrays, self._state)


@jax.jit
def _kept(hidden_RND: jax.Array, new_RLD: jax.Array, is_row_R: jax.Array) -> jax.Array:
    """The new states in the rows that have some, in their first places."""
    rows, places, d_model = hidden_RND.shape
    new_RLD = new_RLD.reshape(rows, -1, d_model)
    left = places - new_RLD.shape[1]
    new_RND = jnp.pad(new_RLD, ((0, 0), (0, left), (0, 0)))
    return jnp.where(is_row_R[:, None, None], new_RND, hidden_RND)


def _look_ahead(model: Transformer, variables: Variables, *arguments: Any) -> Any:
    return model.apply(variables, *arguments, method="look_ahead")


@partial(jax.jit, static_argnums=0, donate_argnums=7)
def _read(
    model: Transformer,
    variables: Variables,
    hidden_TD: jax.Array,
    next_1T: jax.Array,
    positions_1T: jax.Array,
    rows_1T: jax.Array,
    length_R: jax.Array,
    state: ModelState,
) -> ModelState:
    """The state with these places of prompts; see steps.Pieces."""
    step = make_step(next_1T, positions_1T, rows_BL=rows_1T)
    state = rewind(state, length_R)
    _, state = _look_ahead(model, variables, hidden_TD[None], next_1T, step, state)
    return steps.laid_out(state)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _propose(
    model: Transformer,
    length: int,
    variables: Variables,
    hidden_RND: jax.Array,
    next_RN: jax.Array,
    positions_RN: jax.Array,
    state: ModelState,
) -> tuple[jax.Array, ModelState]:
    """Drafts of each row, int32 [R, length], and the state with its places.

    Args:
      positions_RN: -1 where a row has fewer places, and for rows without any.
    """
    is_row_R = positions_RN[:, 0] >= 0
    state = rewind(state, jnp.where(is_row_R, positions_RN[:, 0], UNTOUCHED))
    step = make_step(next_RN, positions_RN)
    hidden_RND, state = _look_ahead(model, variables, hidden_RND, next_RN, step, state)
    last_R11 = jnp.argmax(positions_RN, axis=1)[:, None, None]
    hidden_R1D = jnp.take_along_axis(hidden_RND, last_R11, axis=1)
    place_R1, drafts = positions_RN.max(axis=1, keepdims=True), []
    for _ in range(length):
        if drafts:
            place_R1 = jnp.where(is_row_R[:, None], place_R1 + 1, -1)
            step = make_step(drafts[-1], place_R1)
            made = _look_ahead(model, variables, hidden_R1D, drafts[-1], step, state)
            hidden_R1D, state = cast(Any, made)
        logits_R1V = unembed(hidden_R1D, output_weights(model, variables, as_stored=True))
        drafts.append(jnp.argmax(logits_R1V, axis=-1).astype(jnp.int32))
    return jnp.concatenate(drafts, axis=1), steps.laid_out(state)
