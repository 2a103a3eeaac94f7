"""Reading prompts: which tokens a step reads, and the programs that do.

A prompt longer than a page is read by programs of `block` tokens, a shorter one by smaller ones:
which one is said by the request alone, and a program's sums are the same wherever in it a token
lies. So what a prompt leaves does not depend on its neighbours, nor on where its pieces are cut.

R rows (sequences), T tokens of a program, B pieces of L tokens, D d_model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from infer.engine.memory import Memory
from infer.engine.options import EngineOptions
from infer.engine.programs import Programs
from infer.engine.routed import Span
from infer.engine.sequence import TokenSequence
from infer.engine.types import TokenLogprobs
from infer.steps import Pieces, StateSize
from model.model_state import unmixable_reason
from model.step import ChosenExperts

SHORT_WIDTHS = (16, 64)
"""Tokens of the programs that read prompts of a page at most."""
CPU_BLOCK, BLOCK = 128, 512
"""Tokens of the others, where the options don't say."""
NOT_REWOUND = np.iinfo(np.int32).max


Ran = tuple[jax.Array, jax.Array, ChosenExperts | None]
"""What a program gives: hidden states of all tokens and of each row's last, and their experts."""


@dataclass
class _Part:
    """Tokens of one sequence in a program."""

    sequence: TokenSequence
    begin: int
    end: int
    row: int = 0
    at: int = 0
    """Where they lie in the program: row and column of its tokens."""


@dataclass
class Read:
    """What a program read."""

    hidden_RD: jax.Array
    """Of each row's last token."""
    finished: list[TokenSequence] = field(default_factory=list)
    """Whose prompts are read to the end."""
    chosen: ChosenExperts | None = None
    """The experts of all its tokens, where the engine keeps them."""
    spans: list[Span] = field(default_factory=list)
    """Whose tokens they are."""
    hidden_TD: jax.Array | None = None
    """Of all its tokens."""


class Reader:
    """Runs the programs that read prompts."""

    def __init__(self, programs: Programs, options: EngineOptions, size: StateSize) -> None:
        self._programs, self._size = programs, size
        self._rows, self._most = options.max_rows, options.piece
        self._target, self._keeps_experts = options.target_seconds, options.keeps_experts
        self.seconds_per_token: float | None = None
        """That reading takes, with all else that a step does; as the engine measures it."""
        self.is_mixed = unmixable_reason(programs.model.config) is None
        self.widths = widths_of(options)
        self._page_size, self._turn = options.page_size, 0

    def width_of(self, prompt_length: int) -> int:
        """Tokens of the programs that read a prompt of this length."""
        if prompt_length > self._page_size:
            return self.widths[-1]
        return next((w for w in self.widths if w >= prompt_length), self.widths[-1])

    def budget(self) -> int:
        """Tokens that a step reads: as many whole programs as keep its time, one at least."""
        if self._target is None or self.seconds_per_token is None:
            return self._most
        width = self.widths[-1]
        fitting = int(self._target / max(self.seconds_per_token, 1e-9)) // width * width
        return min(max(fitting, width), self._most)

    def read(self, reading: list[TokenSequence], memory: Memory, preference: Any) -> Iterator[Read]:
        """Reads pieces of these prompts, within the budget, of which each has its share."""
        if self.is_mixed:
            shares = fair_shares(self.budget(), [s.unread for s in reading])
        else:
            shares = self._whole_pieces(reading)
        for width in self.widths:
            pairs = zip(reading, shares, strict=True)
            own = [(s, share) for s, share in pairs if s.width == width and share]
            programs = self._packed(own, width) if self.is_mixed else self._rowed(own, width)
            for parts in programs:
                yield self._run(parts, width, memory, preference)

    def _whole_pieces(self, reading: list[TokenSequence]) -> list[int]:
        """Shares of whole pieces within the budget, one at least; who was served longest ago comes
        first."""
        budget = self.budget()
        shares, left = [0] * len(reading), budget
        order = sorted(range(len(reading)), key=lambda i: reading[i].served)
        for i in order * (1 + budget // self.widths[0]):
            sequence = reading[i]
            is_first = left == budget
            if shares[i] < sequence.unread and (is_first or left >= sequence.width):
                shares[i] += sequence.width
                left = max(left - sequence.width, 0)
                self._turn += 1
                sequence.served = self._turn
        return shares

    def _packed(self, own: Sequence[tuple[TokenSequence, int]], width: int) -> list[list[_Part]]:
        """One row of tokens after the other."""
        programs, used = [], width
        for sequence, share in own:
            begin, left = sequence.read, share
            while left:
                end = self._pause(sequence, begin, begin + left)
                if used == width or (programs[-1] and programs[-1][-1].sequence is sequence):
                    programs, used = [*programs, []], 0
                count = min(end - begin, width - used)
                programs[-1].append(_Part(sequence, begin, begin + count, at=used))
                begin, left, used = begin + count, left - count, used + count
        return programs

    def _rowed(self, own: Sequence[tuple[TokenSequence, int]], width: int) -> list[list[_Part]]:
        """A row of tokens for each piece, which ends on the grid of kept states or with the prompt:
        recurrent layers read whole blocks."""
        programs: list[list[_Part]] = []
        for sequence, share in own:
            begin, last = sequence.read, min(sequence.read + share, len(sequence.prompt))
            while begin < last:
                end = self._pause(sequence, begin, min(begin + width, len(sequence.prompt)))
                fits = (p for p in programs if len(p) < self.num_rows(width))
                free = next((p for p in fits if all(x.sequence is not sequence for x in p)), None)
                if free is None or begin > sequence.read:
                    free = []
                    programs.append(free)
                free.append(_Part(sequence, begin, end, row=len(free)))
                begin = end
        return programs

    def num_rows(self, width: int) -> int:
        """Pieces of this width that are read side by side where each has a row of tokens."""
        return max(1, min(self.widths[-1] // width, self._rows))

    @staticmethod
    def _pause(sequence: TokenSequence, begin: int, end: int) -> int:
        return min([stop for stop in sequence.stops if begin < stop < end], default=end)

    def _run(self, parts: list[_Part], width: int, memory: Memory, preference: Any) -> Read:
        run = self._run_mixed if self.is_mixed else self._run_rows
        hidden, hidden_RD, chosen = run(parts, width, memory, preference)
        spans = [Span(p.sequence, p.row, p.at, p.begin, p.end - p.begin) for p in parts]
        made = Read(hidden_RD, chosen=chosen, spans=spans, hidden_TD=hidden)
        for part in parts:
            sequence = part.sequence
            sequence.read = part.end
            memory.advance(sequence)
            if not sequence.unread:
                made.finished.append(sequence)
        if any(part.sequence.request.prompt_logprobs for part in parts):
            self._score(parts, hidden)
        return made

    def programs(
        self, memory: Memory, preference: Any, choose: Callable[[jax.Array], None]
    ) -> list[Callable[[], None]]:
        """All that it runs, with nothing to read.

        Args:
          choose: called with logits after a prompt, [R, V].
        """

        def read(width: int) -> None:
            if self.is_mixed:
                made = self.run_pieces(self.no_pieces(width), memory, preference)
            else:
                made = self.run_rows(self._no_rows(width), memory, preference)
            hidden_TD, hidden_RD, _ = made
            self._programs.score(hidden_TD, np.zeros(len(hidden_TD), np.int32))
            choose(self._programs.logits(hidden_RD))

        return [partial(read, width) for width in self.widths]

    def _run_mixed(self, parts: list[_Part], width: int, memory: Memory, preference: Any) -> Ran:
        pieces = self.no_pieces(width)
        for part in parts:
            row, at = part.sequence.row, slice(part.at, part.at + part.end - part.begin)
            pieces.tokens_1T[0, at] = part.sequence.prompt[part.begin : part.end]
            pieces.positions_1T[0, at] = np.arange(part.begin, part.end)
            pieces.rows_1T[0, at] = row
            pieces.length_R[row], pieces.last_R[row] = part.begin, at.stop - 1
        return self.run_pieces(pieces, memory, preference)

    def no_pieces(self, width: int) -> Pieces:
        """Padding alone."""
        return Pieces(
            tokens_1T=np.zeros((1, width), np.int32),
            positions_1T=np.full((1, width), -1, np.int32),
            rows_1T=np.zeros((1, width), np.int32),
            length_R=np.full(self._rows, NOT_REWOUND, np.int32),
            last_R=np.full(self._rows, -1, np.int32),
        )

    def run_pieces(self, pieces: Pieces, memory: Memory, preference: Any) -> Ran:
        arguments = (memory.state, memory.tables_RN, preference, self._keeps_experts)
        hidden_TD, hidden_RD, memory.state, chosen = self._programs.read_mixed(pieces, *arguments)
        return hidden_TD, hidden_RD, chosen

    def _run_rows(self, parts: list[_Part], width: int, memory: Memory, preference: Any) -> Ran:
        tokens_BL, positions_BL, rows_B, is_first_B = arrays = self._no_rows(width)
        for part in parts:
            count = part.end - part.begin
            tokens_BL[part.row, :count] = part.sequence.prompt[part.begin : part.end]
            positions_BL[part.row, :count] = np.arange(part.begin, part.end)
            rows_B[part.row], is_first_B[part.row] = part.sequence.row, part.begin == 0
        return self.run_rows(arrays, memory, preference)

    def _no_rows(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Padding alone."""
        num = self.num_rows(width)
        tokens_BL = np.zeros((num, width), np.int32)
        rows_B = np.full(num, self._rows, np.int32)
        return tokens_BL, np.full_like(tokens_BL, -1), rows_B, np.zeros(num, bool)

    def run_rows(self, arrays: tuple[Any, ...], memory: Memory, preference: Any) -> Ran:
        arguments = (*arrays, memory.state, memory.tables_RN, preference, self._keeps_experts)
        hidden_TD, hidden_RD, memory.state, chosen = self._programs.read_rows(
            self._size, *arguments
        )
        return hidden_TD, hidden_RD, chosen

    def _score(self, parts: list[_Part], hidden_TD: jax.Array) -> None:
        """Log-probabilities of the prompts' tokens that these pieces predict."""
        next_T = np.zeros(len(hidden_TD), np.int32)
        length = parts[0].sequence.width
        for part in parts:
            first = part.row * length + part.at
            following = part.sequence.prompt[part.begin + 1 : part.end + 1]
            next_T[first : first + len(following)] = following
        made = jax.device_get(self._programs.score(hidden_TD, next_T))
        for part in parts:
            sequence, request = part.sequence, part.sequence.request
            if not request.prompt_logprobs:
                continue
            first, count = part.row * length + part.at, request.num_logprobs or 0
            for i in range(part.begin + 1, min(part.end + 1, len(sequence.prompt))):
                at = first + i - part.begin - 1
                best = zip(made.top_ids_RN[at, :count], made.top_RN[at, :count], strict=True)
                top = tuple((int(token), float(nats)) for token, nats in best)
                nats = float(made.chosen_R[at])
                sequence.scores.append(TokenLogprobs(int(next_T[at]), nats, top))


def widths_of(options: EngineOptions) -> tuple[int, ...]:
    """Tokens of the programs that read prompts, rising."""
    longest = options.max_prompt or options.max_length
    block = options.block or (CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK)
    most = min(block, _power_of_two(options.piece))
    widths = [w for w in SHORT_WIDTHS if w < most and w <= _power_of_two(options.page_size)]
    needed = [w for i, w in enumerate(widths) if i == 0 or longest > widths[i - 1]]
    is_short = bool(needed) and longest <= min(needed[-1], options.page_size)
    return tuple(needed) if is_short else (*needed, max(most, SHORT_WIDTHS[0]))


def _power_of_two(count: int) -> int:
    """The smallest that is not below it."""
    return 1 << (count - 1).bit_length()


def fair_shares(budget: int, wants: Sequence[int]) -> list[int]:
    """The budget cut among those who want some: nobody gets more than he wants, and nobody more
    than another who still wants; what can't be cut evenly goes to the first."""
    shares, left = [0] * len(wants), budget
    while left:
        open_ = [i for i, want in enumerate(wants) if want > shares[i]]
        if not open_:
            break
        each = max(1, left // len(open_))
        for i in open_:
            more = min(each, wants[i] - shares[i], left)
            shares[i], left = shares[i] + more, left - more
    return shares
