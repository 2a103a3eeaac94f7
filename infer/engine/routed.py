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
        self._most = max((y.config.router.top_k for y in layers.values()), default=0)
        self._counts_PE = {
            name: np.zeros((self._periods, layer.config.num_experts), np.int64)
            for name, layer in layers.items()
        }
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
            self._count(chosen, spans)
            for span in spans:
                if span.sequence.request.wants_experts:
                    span.sequence.experts.append((span.begin, self._ids_of(chosen, span)))

    def told(self, sequence: TokenSequence, *, is_read_whole: bool) -> np.ndarray:
        """The experts of all tokens that a sequence has read, int32 [T, N, K].

        Args:
          is_read_whole: whether its last token was read, too.
        """
        self.settle()
        size = sequence.known - (not is_read_whole)
        num_layers = self._periods * len(self._names)
        found_TNK = np.full((size, num_layers, self._most), -1, np.int32)
        for begin, ids_TNK in sequence.experts:  # of what was read twice, the later
            end = min(begin + len(ids_TNK), size)
            found_TNK[begin:end] = ids_TNK[: max(end - begin, 0)]
        return found_TNK

    def counts(self) -> tuple[np.ndarray, ...]:
        """Tokens of each expert so far, int64 [E] of each layer."""
        each = self._counts_PE.values()
        return tuple(counts_PE[p].copy() for p in range(self._periods) for counts_PE in each)

    def _count(self, chosen: ChosenExperts, spans: Sequence[Span]) -> None:
        """All tokens of a program at once: it is done at every step."""
        for name, counts_PE in self._counts_PE.items():
            ids_PBLK = chosen[name]
            is_read_BL = np.zeros(ids_PBLK.shape[1:3], bool)
            for span in spans:
                is_read_BL[span.row, span.at : span.at + span.count] = True
            ids_PTK = ids_PBLK[:, is_read_BL]
            places_PTK = ids_PTK + np.arange(self._periods)[:, None, None] * counts_PE.shape[1]
            found = np.bincount(places_PTK[ids_PTK >= 0], minlength=counts_PE.size)
            counts_PE += found.reshape(counts_PE.shape)

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
