"""The engine: many sequences generated at once, each as if it were alone.

A request has tokens that are known and tokens that the model has read; every step closes the gap:
prompts are read in pieces, within a budget of tokens for a step, and then every sequence whose
prompt is read gets its next token. A prompt that begins like one before starts with what was read
then; a sequence whose pages go to an older one starts again, and its text is read once more as it
was written. Rows that end are given to requests that wait.

R rows (sequences), V vocab.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from infer import steps
from infer.engine.answering import Taken, emitted_of, take
from infer.engine.checks import check_model, check_request
from infer.engine.drafting import Drafting, Verifier, new_drafting
from infer.engine.keys import identity_of, root_key
from infer.engine.memory import PagedMemory, mean_of
from infer.engine.new_memory import beside, kept_details, new_memory, state_size
from infer.engine.options import EngineOptions
from infer.engine.preferences import Preferences
from infer.engine.programs import Programs, WholeModel
from infer.engine.reading import Read, Reader
from infer.engine.routed import RoutedExperts, Span
from infer.engine.sampler import Chosen, Sampler
from infer.engine.sequence import TokenSequence
from infer.engine.types import Emitted, EngineStats, Request
from infer.generation import Timings
from infer.self_speculative import Draft, Verified
from model.step import ChosenExperts
from model.transformer import Transformer, Variables
from model.unstacked import unstack


class Engine:
    """Generates for the requests that `add` gives it, one `step` after the other; all calls come
    from one thread.

    Args:
      mesh: where the variables lie; None is one device.
      programs: that run the model, whose own `model` and `variables` these are; None runs it whole.
    Raises:
      UserError: options that the model, or these programs, can't follow.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Variables,
        options: EngineOptions,
        *,
        mesh: Mesh | None = None,
        programs: Programs | None = None,
    ) -> None:
        if programs is not None:
            programs.check(options, mesh)
        check_model(model, options)
        if options.has_detour and model.config.num_periods > 1:
            model, variables = unstack(model, variables)
            programs = None  # of the model as it is now
        self.timings = Timings()
        self._model, self._variables, self._options = model, variables, options
        self._programs = programs = programs or WholeModel(model, variables)
        self._mesh = mesh
        self._began, rows = time.monotonic(), options.max_rows
        size = state_size(model, options)
        self._reader = Reader(programs, options, size)
        with self._in_mesh():
            self._memory = new_memory(model, options, size)
            self._sampler = Sampler(rows, model.config.vocab_size)
        self._memory.state = beside(variables, self._memory.state)
        self._sampler.counts = beside(variables, self._sampler.counts)
        needs_weights = options.cache_dir is not None  # others' prefixes may lie there
        with self._in_mesh():
            self._identity = identity_of(
                model,
                programs.weights() if needs_weights else None,
                kept_details(options, size, self._memory),
            )
        self._routed = RoutedExperts(model.config) if options.keeps_experts else None
        with self._in_mesh():
            width = self._reader.widths[-1]
            self._drafting = new_drafting(options, model, variables, width)
        self._ahead = None if self._drafting is None else self._drafting.ahead
        parts = (self._sampler, self._routed, self._ahead)
        self._verifier = Verifier(programs, *parts)
        self._token_R, self._position_R = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        self._preferences = Preferences(model.config, rows)
        self._sequences: list[TokenSequence | None] = [None] * rows
        self._waiting: deque[TokenSequence] = deque()
        self._cancelled: list[Emitted] = []
        self._next_number = self._preemptions = 0
        self._prompt_tokens = self._generated_tokens = 0

    def add(self, request: Request) -> int:
        """Takes a request and returns its number: 0, 1, 2, ...

        Raises:
          UserError: one that can never be served.
        """
        check_request(self._model, self._options, request)
        number, self._next_number = self._next_number, self._next_number + 1
        width = self._reader.width_of(len(request.prompt))
        root = root_key(self._identity + width.to_bytes(8, "little"), request)
        self._waiting.append(TokenSequence(number, request, width, root))
        return number

    def cancel(self, number: int) -> None:
        """Ends a request: its row and pages are free at once, and the next step tells it; one that
        is unknown or has ended is left alone."""
        for sequence in (*self._running(), *self._waiting):
            if sequence.number == number:
                if not sequence.is_running:
                    self._waiting.remove(sequence)
                else:
                    self._free(sequence)
                self._cancelled.append(emitted_of(sequence, Taken(reason="cancelled")))

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Compiles every program that the options can meet; afterwards nothing is compiled.

        Args:
          on_progress: called with the programs done and all of them.
        Raises:
          ValueError: there are requests: ask before the first one.
        """
        if self.has_work():
            raise ValueError("an engine warms up before its first request: it has some")
        if not self._options.has_detour:
            self._preferences.begin()
        sample = self._sampler.warm_up
        reads = self._reader.programs(self._memory, self._preferences.arrays, sample)
        own = self._programs.warm_ups()
        thunks = [*own, *reads, *self._memory.programs(), self._run_idle]
        with self._in_mesh():
            for done, thunk in enumerate(thunks):
                on_progress(done, len(thunks))
                thunk()
                if thunk not in reads or not self._programs.are_kept:
                    thunk()  # what it gave is laid out as what it takes from then on
        on_progress(len(thunks), len(thunks))

    def has_work(self) -> bool:
        """Whether some request has not ended, or its end was not told yet."""
        return bool(self._waiting or self._cancelled or self._running())

    def stats(self) -> EngineStats:
        """What the engine does and has done."""
        pool = self._memory.pool if isinstance(self._memory, PagedMemory) else None
        return EngineStats(
            running=len(self._running()),
            waiting=len(self._waiting),
            free_pages=pool.num_free if pool else 0,
            num_pages=pool.num_pages - 1 if pool else 0,
            prefix_queries=self._memory.queries,
            prefix_hits=self._memory.hits,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            expert_tokens=() if self._routed is None else self._routed.counts(),
            paging=self._programs.paging(),
        )

    def step(self) -> list[Emitted]:
        """Reads pieces of prompts within the budget, then gives every other sequence a token."""
        with self._in_mesh():
            told, self._cancelled = self._cancelled, []
            self._admit()
            began, unread = time.monotonic(), self._unread()
            emitted = self._read_prompts() + self._decode()
            if self._routed is not None:
                self._routed.settle()
        self._measure(unread - self._unread(), time.monotonic() - began)
        return told + emitted

    # --- Rows ------------------------------------------------------------------------------------

    def _running(self) -> list[TokenSequence]:
        """Those with a row, the oldest first."""
        return sorted(filter(None, self._sequences), key=lambda s: s.number)

    def _unread(self) -> int:
        return sum(s.unread for s in self._running())

    def _measure(self, num_read: int, seconds: float) -> None:
        if num_read > 0:
            self._reader.seconds_per_token = mean_of(
                self._reader.seconds_per_token, seconds / num_read
            )
            self._memory.seconds_per_token = self._reader.seconds_per_token

    def _admit(self) -> None:
        """Gives free rows to requests in their order; one whose beginning another is about to read
        lets others by until it has."""
        if self._options.batching == "static" and self._running():
            return
        for row, taken in enumerate(self._sequences):
            if taken is not None:
                continue
            ready = (s for s in self._waiting if not self._memory.is_awaited(s))
            sequence = next(ready, None)
            if sequence is None:
                return
            if not self._memory.place(sequence, row, len(self._running())):
                return
            self._waiting.remove(sequence)
            self._sequences[row] = sequence
            self._sampler.place(row, sequence.request.sampling)
            self._preferences.place(row, sequence.request.preference)
            self._prompt_tokens += len(sequence.prompt) if not sequence.text else 0
            if not sequence.unread:
                self._go_on(sequence)

    def _free(self, sequence: TokenSequence, *, is_broken: bool = False) -> None:
        row = sequence.row
        self._sequences[row], self._position_R[row] = None, -1
        self._memory.free(sequence, is_broken=is_broken)

    def _grow(self, sequence: TokenSequence) -> bool:
        """Room for the token that a sequence reads next, if need be that of the youngest; False if
        that is its own, and it waits again."""
        while not self._memory.grow(sequence, sequence.read + 1):
            youngest = self._running()[-1]
            self._preemptions += 1
            self._free(youngest)
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    # --- Prompts ---------------------------------------------------------------------------------

    def _read_prompts(self) -> list[Emitted]:
        emitted: list[Emitted] = []
        reading = [s for s in self._running() if s.unread]
        for read in self._reader.read(reading, self._memory, self._preferences.arrays):
            if self._routed is not None:
                self._routed.note(read.chosen, read.spans)
            for sequence in read.finished:
                self._go_on(sequence)
            begun = [s for s in read.finished if not s.text]
            if begun:
                logits_RV = self._programs.logits(read.hidden_RD)
                emitted += self._take_chosen(logits_RV, begun, is_first=True)
            self._look_ahead(read, begun)
        return emitted

    def _look_ahead(self, read: Read, begun: list[TokenSequence]) -> None:
        """Tells the module that drafts, if one does, what was read."""
        if self._drafting is None or self._ahead is None:
            return
        if not self._drafting.rests:
            assert read.hidden_TD is not None
            self._ahead.read(read.hidden_TD, [s for s in read.spans if s.sequence.is_running])
        begun = [s for s in begun if s.is_running]
        if begun:
            given = [(s, len(s.prompt) - 1, s.text[:1]) for s in begun]
            self._ahead.note(read.hidden_RD, given)

    def _go_on(self, sequence: TokenSequence) -> None:
        """The prompt is read: what follows is the text, from its beginning or where it was."""
        self._sampler.begin(sequence)
        self._point(sequence)

    def _point(self, sequence: TokenSequence) -> None:
        """The token that a row reads next, and its place; before the first token of a text, the
        prompt's last."""
        at = sequence.read if sequence.text else len(sequence.prompt) - 1
        self._token_R[sequence.row] = sequence.tokens(at, at + 1)[0]
        self._position_R[sequence.row] = at

    # --- Texts -----------------------------------------------------------------------------------

    def _decode(self) -> list[Emitted]:
        """The next token, or tokens of a draft, of every row whose prompt is read."""
        began = time.monotonic()
        live = [s for s in self._running() if s.text and self._position_R[s.row] >= 0]
        live = [s for s in live if s.is_running and self._grow(s)]
        live = [s for s in live if s.is_running]
        if not live:
            return []
        if isinstance(self._options.draft, Draft):
            emitted, count_N, layers_N = self._decode_draft(live)
        elif self._drafting is not None:
            emitted, count_N, layers_N = self._decode_drafted(live, self._drafting)
        else:
            emitted, count_N, layers_N = self._decode_tokens(live)
        given = sum(len(e.tokens) for e in emitted)
        self.timings.add(time.monotonic() - began, given, count_N, layers_N)
        return emitted

    def _decode_tokens(
        self, live: list[TokenSequence]
    ) -> tuple[list[Emitted], np.ndarray, np.ndarray | None]:
        """One token of each, and the layers it took."""
        memory, rows = self._memory, [s.row for s in live]
        logits_RV, layers_R, chosen = self._run_decode(*self._inputs(live))
        layers_N = None if layers_R is None else np.asarray(layers_R)[rows]
        if self._routed is not None:
            self._routed.note(chosen, [Span(s, s.row, 0, s.read, 1) for s in live])
        for sequence in live:
            sequence.read += 1
            memory.advance(sequence)
        repeated = [s for s in live if s.read < s.known]  # texts that are read once more
        emitted = self._take_chosen(logits_RV, [s for s in live if s not in repeated])
        for sequence in repeated:
            self._point(sequence)
        return emitted, np.ones(len(live), int), layers_N

    def _decode_drafted(
        self, live: list[TokenSequence], drafting: Drafting
    ) -> tuple[list[Emitted], np.ndarray, None]:
        """As many tokens of each as hold of its draft, and one more."""
        began, memory = time.monotonic(), self._memory
        drafts = drafting.propose(live)
        for sequence, draft in drafts.items():
            memory.grow(sequence, sequence.read + 1 + len(draft))  # if there are pages: no matter
            del draft[max(memory.room(sequence) - 1, 0) :]
        width = 1 + drafting.draft.length if drafts else 1
        chosen = self._verifier.run(live, drafts, width, memory, self._preferences.arrays)
        counts = {s.number: len(chosen[s]) for s in live}
        drafting.learn(time.monotonic() - began, drafts, counts)
        emitted = []
        for sequence in live:
            if chosen[sequence]:
                emitted.append(self._take(sequence, chosen[sequence]))
            else:  # its text is read once more
                sequence.read += 1
                self._point(sequence)
            if sequence.is_running:
                memory.advance(sequence)
        return emitted, np.maximum([counts[s.number] for s in live], 1), None

    def _run_decode(
        self, token_R: np.ndarray, position_R: np.ndarray
    ) -> tuple[jax.Array, jax.Array | None, ChosenExperts | None]:
        """The logits after each row's newest token, [R, V], the layers it took, its experts."""
        memory, threshold = self._memory, self._options.exit_threshold
        inputs = (token_R, position_R, memory.state)
        if threshold is not None:
            logits_RV, memory.state, layers_R = steps.decode_early(
                self._model, self._variables, *inputs, threshold
            )
            return logits_RV, layers_R, None
        options = (memory.tables_RN, self._preferences.arrays, self._routed is not None)
        logits_RV, memory.state, chosen = self._programs.decode(*inputs, *options)
        return logits_RV, None, chosen

    def _run_draft(self, token_R: np.ndarray, position_R: np.ndarray) -> Verified:
        assert isinstance(self._options.draft, Draft)
        made = steps.decode_draft(
            self._model,
            self._variables,
            self._options.draft,
            token_R,
            position_R,
            self._memory.state,
        )
        self._memory.state = made.state
        return made

    def _run_idle(self) -> None:
        """The programs of decoding, with no row that does anything."""
        idle = self._inputs([])
        if isinstance(self._options.draft, Draft):
            self._run_draft(*idle)
        elif self._drafting is not None:
            for width in (1, 1 + self._drafting.draft.length):
                self._verifier.run([], {}, width, self._memory, self._preferences.arrays)
            if self._drafting.small is not None:
                self._drafting.small.warm_up()
            if self._ahead is not None:
                self._ahead.warm_up(self._reader.widths)
        else:
            logits_RV, *_ = self._run_decode(*idle)
            self._sampler.warm_up(logits_RV)

    def _decode_draft(self, live: list[TokenSequence]) -> tuple[list[Emitted], np.ndarray, None]:
        made = self._run_draft(*self._inputs(live))
        tokens_RN, count_R = np.asarray(made.tokens_BN), np.asarray(made.count_B)
        emitted, counts = [], count_R[[s.row for s in live]]
        for sequence in live:
            row = sequence.row
            chosen = [Chosen(int(t), None) for t in tokens_RN[row, : count_R[row]]]
            emitted.append(self._take(sequence, chosen))
        return emitted, counts, None

    def _inputs(self, live: list[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
        """Newest tokens and their places, in arrays that nobody writes to later."""
        position_R = np.full_like(self._position_R, -1)
        rows = [s.row for s in live]
        position_R[rows] = self._position_R[rows]
        return self._token_R.copy(), position_R

    def _take_chosen(
        self, logits_RV: jax.Array, sequences: list[TokenSequence], *, is_first: bool = False
    ) -> list[Emitted]:
        if not sequences:
            return []
        chosen = self._sampler.choose(logits_RV, sequences, self._position_R)
        if is_first and not self.timings.first_token_seconds:
            self.timings.first_token_seconds = time.monotonic() - self._began
        return [self._take(s, [chosen[s]]) for s in sequences]

    def _take(self, sequence: TokenSequence, chosen: list[Chosen]) -> Emitted:
        """A sequence's new tokens up to its end, where its row and pages are free again."""
        taken, experts_TNK = take(sequence, chosen), None
        self._generated_tokens += len(taken.tokens)
        if taken.reason is not None and sequence.request.wants_experts:
            assert self._routed is not None
            is_read_whole = taken.reason in ("stop", "error")
            experts_TNK = self._routed.told(sequence, is_read_whole=is_read_whole)
        if taken.reason is None:
            sequence.read = sequence.known - 1
            self._point(sequence)
        else:
            self._free(sequence, is_broken=taken.reason == "error")
        return emitted_of(sequence, taken, experts_TNK)

    # --- Devices ---------------------------------------------------------------------------------

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
