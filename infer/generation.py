"""The result of a generation, and its timings.

B prompts, N rows of a step that had not ended.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

OnTokens = Callable[[np.ndarray], None]
"""Called with each prompt's new token, int32 [B]; -1 for prompts that have none."""


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


class Timings:
    """What the decoding steps took and gave."""

    def __init__(self) -> None:
        self.first_token_seconds = 0.0
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
            self.first_token_seconds,
            float(counts.sum() / seconds.sum()),
            float(np.mean(self._layers)) if self._layers else None,
            float(np.mean(self._accepted)) if has_draft and self._accepted else None,
        )
