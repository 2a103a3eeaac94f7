"""Result of a generation: sequences that grow row by row, and their timings.

B rows, N tokens of a step (in `Timings`: rows that had not ended).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

OnTokens = Callable[[np.ndarray], None]
"""Called with each row's new token, int32 [B]; -1 for rows that have none."""


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]
    """New tokens of each prompt, without the one that stopped it."""
    first_token_seconds: float
    """From the call to the first token, compilation included."""
    tokens_per_second: float
    """Over all rows that have not ended, after the first token; compilation left out."""
    mean_layers: float | None = None
    """With exit_threshold: layers that a token after the first went through, on average."""
    mean_accepted: float | None = None
    """With draft: tokens that a step of one row gave, on average."""


class ActiveSequences:
    """The sequences that are being generated."""

    def __init__(
        self, count: int, max_new_tokens: int, stop_ids: frozenset[int], on_tokens: OnTokens
    ) -> None:
        self.outputs: list[list[int]] = [[] for _ in range(count)]
        self.is_done_B = np.zeros(count, bool)
        self._most, self._stop_ids, self._on_tokens = max_new_tokens, stop_ids, on_tokens

    def add(self, tokens_BN: np.ndarray, count_B: np.ndarray) -> int:
        """Each row's first count_B tokens, up to its end; how many there were."""
        added = 0
        for n in range(count_B.max()):
            shown_B = np.full(len(count_B), -1, np.int32)
            for row in np.flatnonzero(~self.is_done_B & (n < count_B)):
                token = int(tokens_BN[row, n])
                added += 1
                if token in self._stop_ids:
                    self.is_done_B[row] = True
                    continue
                self.outputs[row].append(token)
                shown_B[row] = token
                self.is_done_B[row] = len(self.outputs[row]) == self._most
            self._on_tokens(shown_B)
        return added


class Timings:
    """Durations of the steps, and the tokens that they gave."""

    def __init__(self, first_token_seconds: float) -> None:
        self._first = first_token_seconds
        self._steps: list[tuple[float, int]] = []
        self._layers: list[int] = []
        self._accepted: list[int] = []

    def add(
        self, seconds: float, added: int, count_N: np.ndarray, layers_N: np.ndarray | None
    ) -> None:
        """
        Args:
          added: tokens of this step that belong to the texts.
          count_N: tokens that the step gave each row that had not ended.
          layers_N: layers that each of these rows went through, if that differs.
        """
        self._steps.append((seconds, added))
        self._accepted += count_N.tolist()
        if layers_N is not None:
            self._layers += layers_N.tolist()

    def generation(self, tokens: list[list[int]], *, has_draft: bool) -> Generation:
        """The first step compiles: it does not count."""
        seconds, counts = np.array(self._steps[1:] or [(1.0, 0)]).T
        return Generation(
            tokens,
            self._first,
            float(counts.sum() / seconds.sum()),
            float(np.mean(self._layers)) if self._layers else None,
            float(np.mean(self._accepted)) if has_draft and self._accepted else None,
        )
