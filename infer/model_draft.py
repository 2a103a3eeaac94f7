"""Drafts by a second, smaller model of the same vocabulary (Leviathan et al. 2023).

It reads what is known of each row and says greedily how it would go on. A greedy draft is certain,
so that the large model's own draws decide (infer/speculative.py): the text is the large model's.

R rows (sequences), T tokens of a program.
"""

from dataclasses import dataclass, field

import numpy as np

from configs.architecture import ModelConfig
from configs.checks import require, require_positive
from infer import steps
from infer.steps import Pieces, StateSize
from model.model_state import unmixable_reason, unrewindable_reason
from model.transformer import Transformer, Variables

WIDTHS = (16, 64, 128)
"""Tokens of the programs that read."""
UNTOUCHED = np.iinfo(np.int32).max


@dataclass(frozen=True)
class ModelDraft:
    """Who drafts, and how much."""

    model: Transformer
    variables: Variables = field(repr=False, compare=False)
    length: int = 4
    """Tokens drafted, which one step of the large model verifies."""

    def __post_init__(self) -> None:
        require_positive(self, "length")


def check_model_draft(config: ModelConfig, draft: ModelDraft) -> None:
    """
    Raises:
      UserError: another vocabulary, a shorter context, or a state that can't go back.
    """
    small = draft.model.config
    require(
        small.vocab_size == config.vocab_size,
        f"the draft model has {small.vocab_size} tokens and the model {config.vocab_size}: they "
        "must have one tokenizer",
    )
    for reason in (unmixable_reason(small), unrewindable_reason(small)):
        require(reason is None, f"the draft model can't go back ({reason}): take another")


class DraftModel:
    """The small model's state, a row for each of the engine's."""

    def __init__(self, draft: ModelDraft, num_rows: int, max_length: int) -> None:
        self._draft, self._rows = draft, num_rows
        longest = min(max_length, draft.model.config.context_length)
        self._longest = longest
        dtype = draft.model.execution.compute_dtype
        size = StateSize(num_rows, longest, dtype, spare=WIDTHS[-1] - 1)
        self._state = steps.empty_state(draft.model, size)
        self._read: dict[int, tuple[int, int]] = {}
        """By row: whose tokens the state holds, and how many."""

    def propose(self, wanted: dict[int, tuple[int, list[int]]], most: int) -> dict[int, list[int]]:
        """What each row would say next, `most` tokens of it.

        Args:
          wanted: by row, the number of its request and all its tokens.
        """
        wanted = {row: x for row, x in wanted.items() if len(x[1]) + most <= self._longest}
        if not wanted:
            return {}
        token_R, position_R = self._catch_up(wanted), np.full(self._rows, -1, np.int32)
        drafts = {row: [int(token_R[row])] for row in wanted}
        for row, (_, tokens) in wanted.items():
            position_R[row] = len(tokens)
        for _ in range(most - 1):
            token_R = self.decode(token_R, position_R)
            position_R = np.where(position_R >= 0, position_R + 1, -1).astype(np.int32)
            for row in wanted:
                drafts[row].append(int(token_R[row]))
        return drafts

    def _catch_up(self, wanted: dict[int, tuple[int, list[int]]]) -> np.ndarray:
        """Reads what each row holds and the state doesn't; what it says next, [R]."""
        token_R = np.zeros(self._rows, np.int32)
        left = {}
        for row, (number, tokens) in wanted.items():
            owner, read = self._read.get(row, (-1, 0))
            # The newest token is always read again: what it says next was not kept.
            left[row] = min(read, len(tokens) - 1) if owner == number else 0
            self._read[row] = (number, len(tokens))
        while left:
            unread = sum(len(wanted[row][1]) - read for row, read in left.items())
            width = next((w for w in WIDTHS if w >= unread), WIDTHS[-1])
            pieces, used, finished = no_pieces(width, self._rows), 0, []
            for row, begin in left.items():
                tokens = wanted[row][1]
                end = min(len(tokens), begin + width - used)
                if end == begin:
                    continue
                at = slice(used, used + end - begin)
                pieces.tokens_1T[0, at] = tokens[begin:end]
                pieces.positions_1T[0, at] = np.arange(begin, end)
                pieces.rows_1T[0, at] = row
                pieces.length_R[row], pieces.last_R[row] = begin, at.stop - 1
                used, left[row] = at.stop, end
                finished += [row] if end == len(tokens) else []
            said_R = self.read(pieces)
            token_R[finished] = said_R[finished]
            left = {row: read for row, read in left.items() if row not in finished}
        return token_R

    def read(self, pieces: Pieces) -> np.ndarray:
        """What each row says after these tokens, [R]."""
        model, variables = self._draft.model, self._draft.variables
        _, hidden_RD, self._state, _ = steps.read_mixed(
            model, variables, pieces, self._state, None, None
        )
        return np.asarray(steps.best_of(steps.logits_of(model, variables, hidden_RD)))

    def decode(self, token_R: np.ndarray, position_R: np.ndarray) -> np.ndarray:
        """What each row says after its token, [R]."""
        logits_RV, self._state, _ = steps.decode(
            self._draft.model,
            self._draft.variables,
            token_R,
            position_R,
            self._state,
            None,
            None,
        )
        return np.asarray(steps.best_of(logits_RV))

    def warm_up(self) -> None:
        """Runs all its programs with nothing to read."""
        for width in WIDTHS:
            self.read(no_pieces(width, self._rows))
        idle_R = np.full(self._rows, -1, np.int32)
        self.decode(np.zeros(self._rows, np.int32), idle_R)


def no_pieces(width: int, num_rows: int) -> Pieces:
    """Padding alone."""
    return Pieces(
        tokens_1T=np.zeros((1, width), np.int32),
        positions_1T=np.full((1, width), -1, np.int32),
        rows_1T=np.zeros((1, width), np.int32),
        length_R=np.full(num_rows, UNTOUCHED, np.int32),
        last_R=np.full(num_rows, -1, np.int32),
    )
