"""The settings of each row, and the choice of its next token.

R rows (sequences), V vocab.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.choice import Choice, Logprobs, begin_counts, choose
from infer.engine.sequence import TokenSequence
from infer.engine.types import ConstraintFailed, Request, TokenLogprobs
from infer.kept_programs import KeptPrograms
from infer.sampling import Sampling, no_counts, sampling_rows

BROKEN = "the model's numbers for this request are not finite, and no token can be chosen from them"


@dataclass
class Chosen:
    """One row's next token, or why there is none."""

    token: int
    logprobs: TokenLogprobs | None
    error: str | None = None


class Sampler:
    """Chooses tokens for all rows at once."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self._vocab_size, self.counts = vocab_size, no_counts(num_rows, vocab_size)
        self._settings = [Sampling()] * num_rows
        self._kept = KeptPrograms()
        self.rows = sampling_rows(self._settings)
        self.all_allowed_RV = jnp.ones((num_rows, vocab_size), jnp.bool_)

    def place(self, row: int, sampling: Sampling) -> None:
        """A row's settings from now on."""
        if self._settings[row] != sampling:
            self._settings[row] = sampling
            self.rows = sampling_rows(self._settings)

    def begin(self, sequence: TokenSequence) -> None:
        """Counts what a sequence holds whose prompt is read."""
        is_prompt_V = np.zeros(self._vocab_size, bool)
        is_prompt_V[list(sequence.prompt)] = True
        text = np.asarray(sequence.text, np.int64)
        generated_V = np.bincount(text, minlength=self._vocab_size).astype(np.int32)
        row = np.int32(sequence.row)
        begun = (row, is_prompt_V, generated_V)
        self.counts = self._kept.run(begin_counts, self.counts, *begun)

    def choose(
        self, logits_RV: jax.Array, live: list[TokenSequence], position_R: np.ndarray
    ) -> dict[TokenSequence, Chosen]:
        """The next token of each of these sequences.

        Args:
          position_R: of the newest token of each row.
        """
        failed, allowed_RV = self._allowed(live)
        live = [s for s in live if s not in failed]
        is_live_R = np.zeros(len(position_R), bool)
        is_live_R[[s.row for s in live]] = True
        made = self.run(logits_RV, position_R, is_live_R, allowed_RV, asks_logprobs(live))
        chosen = {s: Chosen(0, None, error) for s, error in failed.items()}
        return chosen | {s: chosen_of(s, made, made.logprobs) for s in live}

    def run(
        self,
        logits_RV: jax.Array,
        position_R: np.ndarray,
        is_live_R: np.ndarray,
        allowed_RV: Any,
        has_logprobs: bool,
    ) -> Any:
        """The program, and its results in numpy."""
        made = self._kept.run(
            choose,
            logits_RV,
            self.rows,
            self.counts,
            position_R.copy(),
            is_live_R,
            allowed_RV,
            np.bool_(has_logprobs),
        )
        self.counts = made.counts
        logprobs = made.logprobs if has_logprobs else None
        token_R, is_broken_R, logprobs = jax.device_get((made.token_R, made.is_broken_R, logprobs))
        return Choice(token_R, is_broken_R, logprobs, self.counts)

    def warm_up(self, logits_RV: jax.Array) -> None:
        """Runs all its programs for nobody; the counts of row 0 begin anew.

        Args:
          logits_RV: of the program whose tokens are chosen later: where they lie is compiled in.
        """
        num_rows = len(logits_RV)
        sampling_rows([Sampling(seed=1)])
        self.begin(TokenSequence(0, Request([0], 1), 1, b"", row=0))
        none_R = np.zeros(num_rows, bool)
        for allowed_RV in (self.all_allowed_RV, np.ones(self.all_allowed_RV.shape, bool)):
            self.run(logits_RV, np.zeros(num_rows, np.int32), none_R, allowed_RV, True)

    def _allowed(self, live: list[TokenSequence]) -> tuple[dict[TokenSequence, str], Any]:
        """Sequences whose constraints can't go on, and why; what the others' allow."""
        failed: dict[TokenSequence, str] = {}
        masks: dict[int, np.ndarray] = {}
        for sequence in live:
            constraint = sequence.request.constraint
            if constraint is None:
                continue
            try:
                allowed_V = constraint.allowed_V()
                if allowed_V is not None and not allowed_V.any():
                    raise ConstraintFailed("the constraint allows no token here")
                if allowed_V is not None:
                    masks[sequence.row] = allowed_V
            except ConstraintFailed as error:
                failed[sequence] = str(error)
        if not masks:
            return failed, self.all_allowed_RV
        allowed_RV = np.ones(self.all_allowed_RV.shape, bool)
        for row, allowed_V in masks.items():
            allowed_RV[row] = allowed_V
        return failed, allowed_RV


def asks_logprobs(live: list[TokenSequence]) -> bool:
    """Whether some sequence wants log-probabilities."""
    return any(s.request.num_logprobs is not None for s in live)


def chosen_of(sequence: TokenSequence, made: Any, logprobs: Logprobs | None) -> Chosen:
    """A sequence's part of what the program made."""
    row, count = sequence.row, sequence.request.num_logprobs
    if made.is_broken_R[row]:
        return Chosen(0, None, BROKEN)
    token = int(made.token_R[row])
    if count is None or logprobs is None:
        return Chosen(token, None)
    best = zip(logprobs.top_ids_RN[row, :count], logprobs.top_RN[row, :count], strict=True)
    top = tuple((int(other), float(nats)) for other, nats in best)
    return Chosen(token, TokenLogprobs(token, float(logprobs.chosen_R[row]), top))
