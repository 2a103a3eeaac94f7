"""States after prefixes: what layers keep in rows, as it was when a prefix had been read."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence

import jax
import numpy as np

from infer.engine.tiers import Tiers
from infer.engine.units import Rows, take_row
from model.model_state import ModelState

STATE_GRID = 64
"""States are kept at multiples of it: recurrent layers read blocks of so many tokens."""
SEEN_KEYS = 1 << 16
"""Prefixes that are remembered, so that one which comes again is kept."""


class KeptStates:
    """The state of one sequence after each of some prefixes, by the prefix's key; the longest
    unused are given up first.

    States are kept where a prompt ends, and where another began alike: on a grid of tokens, which
    recurrent layers read in whole blocks.

    Args:
      state: of all rows.
      most_bytes: of kept states.
      tiers: whose files keep them too.
      page_size: tokens of a key.
    """

    def __init__(self, state: ModelState, most_bytes: int, tiers: Tiers, page_size: int) -> None:
        self._tiers, self._rows, self._page_size = tiers, Rows(state), page_size
        self._grid = math.lcm(page_size, STATE_GRID)
        self._most_bytes, self._bytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[ModelState, int]] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def longest(self, keys: Sequence[bytes]) -> tuple[int, ModelState | None]:
        """How many of a prompt's keys the longest prefix with a state has, and the state."""
        every = self._grid // self._page_size  # elsewhere none is kept: no file is looked for
        for end in range(len(keys) // every * every, 0, -every):
            kept = self._find(keys[end - 1])
            if kept is not None:
                return end, kept
        return 0, None

    def on_grid(self, length: int) -> int:
        """The longest prefix of one of this length after which a state may be kept."""
        return length // self._grid * self._grid

    def note(self, keys: Sequence[bytes]) -> set[int]:
        """After how many of its tokens a prompt's state should be kept: of all keys, and of those
        that another prompt had."""
        known = next((i for i in range(len(keys), 0, -1) if keys[i - 1] in self._seen), 0)
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN_KEYS:
            self._seen.popitem(last=False)
        return {self.on_grid(count * self._page_size) for count in (known, len(keys))} - {0}

    def keep(self, key: bytes, state: ModelState, row: int) -> None:
        """Keeps a row's state, unless it is there."""
        if key in self._states:
            return
        kept = take_row(state, np.array([row], np.int32))
        self._hold(key, kept)
        if self._tiers.has_disk():
            self._tiers.keep_on_disk(_file_key(key), self._rows.to_bytes(kept))

    def drop(self, keys: Sequence[bytes]) -> None:
        """Gives up what is kept under these keys."""
        for key in keys:
            kept = self._states.pop(key, None)
            self._bytes -= 0 if kept is None else kept[1]

    def _find(self, key: bytes) -> ModelState | None:
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key][0]
        unit = self._tiers.get(_file_key(key))
        if unit is None:
            return None
        kept = self._rows.from_bytes(unit)
        self._hold(key, kept)
        return kept

    def _hold(self, key: bytes, kept: ModelState) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(kept))
        self._states[key], self._bytes = (kept, size), self._bytes + size
        while self._bytes > self._most_bytes:
            _, (_, size) = self._states.popitem(last=False)
            self._bytes -= size


def _file_key(key: bytes) -> bytes:
    """A prefix's page may lie in a file under the key itself."""
    return hashlib.sha256(b"state" + key).digest()
