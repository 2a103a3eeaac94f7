"""The engine: many sequences generated at once, each as if it were alone.

A request has tokens that are known and tokens that the model has read; every step closes the gap: a
prompt is read in pieces, within a budget of tokens for a step, and then every sequence whose prompt
is read gets its next token. Rows that end are given to requests that wait.

R rows (sequences), V vocab, E experts.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.checks import UserError, require
from infer import steps
from infer.early_exit import check_exits
from infer.engine.options import EngineOptions
from infer.engine.types import Emitted, EngineStats, Request
from infer.generation import Timings
from infer.sampling import Sampling, no_counts, sampling_rows
from infer.self_speculative import check_draft
from infer.steps import StateSize
from model.transformer import Transformer, Variables
from model.unstacked import unstack

SLOTS = 256
"""Dense states have a whole multiple of them: each size is compiled for itself."""
SHORTEST_PIECE = 16
"""Tokens that a piece of a prompt is padded to at least; longer ones to a power of two."""


@dataclass
class _Sequence:
    """A request with a row."""

    number: int
    request: Request
    read: int = 0
    """Tokens of the prompt that the state holds."""
    text: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Engine:
    """Generates for the requests that `add` gives it, one `step` after the other.

    Args:
      mesh: where the variables lie; None is one device.
    Raises:
      UserError: options that the model can't follow.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Variables,
        options: EngineOptions,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        if options.exit_threshold is not None:
            check_exits(model)
        if options.draft is not None:
            check_draft(model, options.draft)
        if (options.exit_threshold, options.draft) != (None, None) and model.config.num_periods > 1:
            model, variables = unstack(model, variables)
        self.timings = Timings()
        self._model, self._variables, self._options = model, variables, options
        self._mesh = mesh
        self._began, rows = time.monotonic(), options.max_rows
        self._size = _state_size(model, options)
        with self._in_mesh():
            self._state = steps.empty_state(model, self._size)
        self._counts = no_counts(rows, model.config.vocab_size)
        self._token_R, self._position_R = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        self._settings = [Sampling()] * rows
        self._sampling = sampling_rows(self._settings)
        self._preference: dict[str, np.ndarray] | None = None
        self._sequences: list[_Sequence | None] = [None] * rows
        self._waiting: deque[_Sequence] = deque()
        self._next_number = 0
        self._free_pages = list(range(1, options.num_pages or 1))
        per_row = -(-self._size.max_length // options.page_size)
        self._tables_RN = np.zeros((rows, per_row), np.int32) if options.num_pages else None

    def add(self, request: Request) -> int:
        """Takes a request and returns its number: 0, 1, 2, ...

        Raises:
          UserError: one that can never be served.
        """
        self._check(request)
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(_Sequence(number, request))
        return number

    def has_work(self) -> bool:
        """Whether some request has not ended."""
        return bool(self._waiting) or any(s is not None for s in self._sequences)

    def cancel(self, number: int) -> None:
        """Ends a request: its row and pages are free at once, and the next step tells it; one that
        is unknown or has ended is left alone."""
        raise NotImplementedError

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Compiles every program that the options can meet; afterwards nothing is compiled.

        Args:
          on_progress: called with the programs done and all of them.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """What the engine does and has done."""
        raise NotImplementedError

    def step(self) -> list[Emitted]:
        """Reads pieces of prompts within the budget, then gives every other sequence a token."""
        with self._in_mesh():
            self._admit()
            emitted = self._read_prompts()
            return emitted + self._decode()

    # --- Prompts ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free rows, and pages for all they may need, to requests in their order."""
        for row, sequence in enumerate(self._sequences):
            if sequence is not None or not self._waiting:
                continue
            needed = self._pages_needed(self._waiting[0].request)
            if needed > len(self._free_pages):
                return
            sequence = self._waiting.popleft()
            sequence.pages = [self._free_pages.pop() for _ in range(needed)]
            if self._tables_RN is not None:
                self._tables_RN[row] = 0
                self._tables_RN[row, :needed] = sequence.pages
            self._sequences[row] = sequence
            self._settings[row] = sequence.request.sampling
            self._sampling = sampling_rows(self._settings)
            self._prefer(row, sequence.request.preference)

    def _read_prompts(self) -> list[Emitted]:
        budget, emitted = self._options.piece, []
        for row, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            left = len(sequence.request.prompt) - sequence.read
            if left and budget:
                count = min(left, budget)
                budget -= count
                hidden_1D = self._read(row, sequence, count)
                if count == left:
                    emitted.append(self._begin_text(row, sequence, hidden_1D))
        return emitted

    def _read(self, row: int, sequence: _Sequence, count: int) -> jax.Array:
        """Reads the next tokens of a prompt."""
        begin, length = sequence.read, _piece_length(count)
        tokens_1L = np.zeros((1, length), np.int32)
        positions_1L = np.full((1, length), -1, np.int32)
        tokens_1L[0, :count] = sequence.request.prompt[begin : begin + count]
        positions_1L[0, :count] = begin + np.arange(count)
        preference = self._preference
        if preference is not None:
            preference = {name: x[:, row : row + 1] for name, x in preference.items()}
        hidden_1D, self._state = steps.read_piece(
            self._model,
            self._size,
            begin == 0,
            self._variables,
            tokens_1L,
            positions_1L,
            np.array([row], np.int32),
            self._state,
            self._tables_RN,
            preference,
        )
        sequence.read += count
        return hidden_1D

    def _begin_text(self, row: int, sequence: _Sequence, hidden_1D: jax.Array) -> Emitted:
        """The first token of a text."""
        prompt = sequence.request.prompt
        is_prompt_V = np.zeros(self._model.config.vocab_size, bool)
        is_prompt_V[list(prompt)] = True
        self._counts = steps.begin_counts(self._counts, row, is_prompt_V)
        logits_RV = steps.prompt_logits(
            self._model, self._options.max_rows, self._variables, hidden_1D, row
        )
        self._position_R[row] = len(prompt) - 1
        is_live_R = np.arange(self._options.max_rows) == row
        token = int(self._choose(logits_RV, is_live_R)[row])
        if not self.timings.first_token_seconds:
            self.timings.first_token_seconds = time.monotonic() - self._began
        self._token_R[row], self._position_R[row] = token, len(prompt)
        return self._take(row, sequence, [token])

    def _choose(self, logits_RV: jax.Array, is_live_R: np.ndarray) -> np.ndarray:
        token_R, self._counts = steps.choose(
            logits_RV, self._sampling, self._counts, self._position_R, is_live_R
        )
        return np.asarray(token_R)

    # --- Texts -----------------------------------------------------------------------------------

    def _decode(self) -> list[Emitted]:
        """The next token, or tokens of a draft, of every row whose prompt is read."""
        live = [(r, s) for r, s in enumerate(self._sequences) if s and self._position_R[r] >= 0]
        if not live:
            return []
        began, rows = time.monotonic(), [row for row, _ in live]
        tokens_RN, count_R, layers_R = self._next_tokens()
        emitted = []
        for row, sequence in live:
            tokens = tokens_RN[row, : count_R[row]].tolist()
            self._token_R[row] = tokens[-1]
            self._position_R[row] += len(tokens)
            emitted.append(self._take(row, sequence, tokens))
        given = sum(len(e.tokens) for e in emitted)
        layers = None if layers_R is None else layers_R[rows]
        self.timings.add(time.monotonic() - began, given, count_R[rows], layers)
        return emitted

    def _next_tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What each row says next, [R, N], how many of them hold, and the layers they took."""
        options, model = self._options, self._model
        if options.draft is not None:
            made = steps.decode_draft(
                model, self._variables, options.draft, self._token_R, self._position_R, self._state
            )
            self._state = made.state
            return np.asarray(made.tokens_BN), np.asarray(made.count_B), None
        rows, layers_R = (self._token_R, self._position_R, self._state), None
        if options.exit_threshold is not None:
            logits_RV, self._state, layers = steps.decode_early(
                model, self._variables, *rows, options.exit_threshold
            )
            layers_R = np.asarray(layers)
        else:
            logits_RV, self._state = steps.decode(
                model, self._variables, *rows, self._tables_RN, self._preference
            )
        token_R = self._choose(logits_RV, self._position_R >= 0)
        return token_R[:, None], np.ones(len(token_R), int), layers_R

    def _take(self, row: int, sequence: _Sequence, tokens: list[int]) -> Emitted:
        """A row's new tokens up to its end, where its row and pages are free again."""
        request, taken, is_done = sequence.request, [], False
        for token in tokens:
            is_done = token in request.stop_ids
            if not is_done:
                sequence.text.append(token)
                taken.append(token)
                is_done = len(sequence.text) == request.max_new_tokens
                is_done |= request.is_stopped is not None and request.is_stopped(sequence.text)
            if is_done:
                self._free(row, sequence)
                break
        return Emitted(sequence.number, taken, is_done)

    def _free(self, row: int, sequence: _Sequence) -> None:
        self._sequences[row], self._position_R[row] = None, -1
        self._free_pages += sequence.pages

    # --- Requests --------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        config, prompt, new = self._model.config, request.prompt, request.max_new_tokens
        require(new >= 1, f"max_new_tokens={new} must be at least 1")
        require(len(prompt) > 0, "a prompt is empty: it needs at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"a prompt has tokens outside [0, {config.vocab_size})")
        asked = f"a prompt of {len(prompt)} tokens and {new} new ones exceed"
        require(
            len(prompt) + new <= config.context_length,
            f"{asked} the model's context_length={config.context_length}: shorten the prompt or "
            "ask for fewer",
        )
        longest = self._options.max_length
        require(len(prompt) + new <= longest, f"{asked} the engine's max_length={longest}")
        needed, pages = self._pages_needed(request), self._options.num_pages
        require(
            pages is None or needed < pages,
            f"{asked} the {pages} pages of {self._options.page_size} positions: {needed} are "
            "needed beside page 0",
        )
        for token, _ in request.sampling.biases:
            require(
                token < config.vocab_size,
                f"logit_bias names token {token}, the vocabulary is [0, {config.vocab_size})",
            )
        temperature, has_draft = request.sampling.temperature, self._options.draft is not None
        require(
            not has_draft or temperature == 0,
            f"draft gives the greedy text, got temperature={temperature}: leave one out",
        )
        require(
            not has_draft or request.sampling == Sampling(seed=request.sampling.seed),
            "draft gives the greedy text, penalties and biases change it: leave one out",
        )
        given = {
            "exit_threshold": self._options.exit_threshold,
            "draft": self._options.draft,
            "a preference for experts": request.preference,
        }
        names = [name for name, value in given.items() if value is not None]
        require(len(names) < 2, f"{' and '.join(names)} can't go together: leave one out")

    def _pages_needed(self, request: Request) -> int:
        if self._options.num_pages is None:
            return 0
        return -(-(len(request.prompt) + request.max_new_tokens) // self._options.page_size)

    def _prefer(self, row: int, wanted: Mapping[str, Any] | None) -> None:
        """Writes a row's preference; the first one makes room for all rows."""
        if wanted is None and self._preference is None:
            return
        if self._preference is None:
            assert wanted is not None
            shapes = {name: np.shape(x) for name, x in wanted.items()}
            self._preference = {
                name: np.zeros((periods, self._options.max_rows, experts), np.float32)
                for name, (periods, _, experts) in shapes.items()
            }
        for name, array in self._preference.items():
            array[:, row] = 0.0 if wanted is None else np.asarray(wanted[name])[:, 0]

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _state_size(model: Transformer, options: EngineOptions) -> StateSize:
    """Slots are rounded up: a conversation that grows is compiled anew only now and then."""
    drafted = options.draft.length if options.draft else 0
    needed = options.max_length + drafted
    slots = min(-(-needed // SLOTS) * SLOTS, max(needed, model.config.context_length))
    is_read_whole = (options.max_prompt or options.max_length) <= options.piece
    return StateSize(
        options.max_rows,
        slots,
        options.kv_dtype or model.execution.compute_dtype,
        drafted if is_read_whole else max(drafted, _piece_length(options.piece) - 1),
        options.num_pages,
        options.page_size,
    )


def _piece_length(count: int) -> int:
    """A power of two, so that few lengths are compiled."""
    return max(SHORTEST_PIECE, 1 << (count - 1).bit_length())
