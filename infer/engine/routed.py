"""The experts that tokens went to: told to requests that ask, and counted.

B rows and L tokens of a program, T tokens of a sequence, N MoE layers of the pattern in the order
of their depth, K experts per token (the most of a layer), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from configs.architecture import ModelConfig
from infer.engine.sequence import TokenSequence
from model.moe_layers import MoELayer, moe_layers
from model.step import ChosenExperts


@dataclass(frozen=True)
class Span:
    """Tokens of a sequence that a program read."""

    sequence: TokenSequence
    row: int
    at: int
    """Where they lie in the program: row and column of its tokens."""
    begin: int
    """The place of the first in the sequence."""
    count: int


class RoutedExperts:
    """What programs said of their tokens' experts; it is fetched once a step."""

    def __init__(self, config: ModelConfig) -> None:
        layers = pattern_layers(config)
        self._names, self._periods = list(layers), config.num_periods
        self._num_experts = [layer.config.num_experts for layer in layers.values()]
        self._most = max((y.config.router.top_k for y in layers.values()), default=0)
        each = [np.zeros(count, np.int64) for count in self._num_experts]
        self._counts = [x.copy() for _ in range(self._periods) for x in each]
        self._pending: list[tuple[ChosenExperts, list[Span]]] = []

    def note(self, chosen: ChosenExperts | None, spans: Sequence[Span]) -> None:
        """A program read these tokens; None: it does not say with which experts."""
        if chosen is not None:
            self._pending.append((chosen, list(spans)))

    def settle(self) -> None:
        """Counts what was noted, and gives each sequence that asks its own."""
        pending, self._pending = self._pending, []
        fetched: list[Any] = jax.device_get([chosen for chosen, _ in pending])
        for chosen, (_, spans) in zip(fetched, pending, strict=True):
            for span in spans:
                ids_TNK = self._ids_of(chosen, span)
                for layer, counts_E in enumerate(self._counts):
                    ids = ids_TNK[:, layer]
                    counts_E += np.bincount(ids[ids >= 0], minlength=len(counts_E))
                if span.sequence.request.wants_experts:
                    span.sequence.experts.append((span.begin, ids_TNK))

    def told(self, sequence: TokenSequence, *, is_read_whole: bool) -> np.ndarray:
        """The experts of all tokens that a sequence has read, int32 [T, N, K].

        Args:
          is_read_whole: whether its last token was read, too.
        """
        self.settle()
        size = sequence.known - (not is_read_whole)
        found_TNK = np.full((size, len(self._counts), self._most), -1, np.int32)
        for begin, ids_TNK in sequence.experts:  # of what was read twice, the later
            end = min(begin + len(ids_TNK), size)
            found_TNK[begin:end] = ids_TNK[: max(end - begin, 0)]
        return found_TNK

    def counts(self) -> tuple[np.ndarray, ...]:
        """Tokens of each expert so far, int64 [E] of each layer."""
        return tuple(counts_E.copy() for counts_E in self._counts)

    def _ids_of(self, chosen: ChosenExperts, span: Span) -> np.ndarray:
        """[T, N, K]; layers with fewer experts per token have none in the last places."""
        shape = (span.count, self._periods, len(self._names), self._most)
        ids = np.full(shape, -1, np.int32)
        for i, name in enumerate(self._names):
            own_PTK = chosen[name][:, span.row, span.at : span.at + span.count]
            ids[:, :, i, : own_PTK.shape[-1]] = own_PTK.swapaxes(0, 1)
        return ids.reshape(span.count, -1, self._most)


def pattern_layers(config: ModelConfig) -> dict[str, MoELayer]:
    """The MoE layers that a token of a text passes: those of the pattern."""
    return {name: layer for name, layer in moe_layers(config).items() if layer.periods}
