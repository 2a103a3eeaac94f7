"""What the model keeps of each sequence, in rows of slots or in pages, and of prefixes for later.

R rows (sequences), N pages of a row.
"""

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np

from infer import steps
from infer.engine.pages import PagePool
from infer.engine.sequence import TokenSequence
from infer.engine.tiers import Tiers
from infer.engine.units import Pages, Rows, put_row, take_row
from infer.steps import StateSize
from model.model_state import ModelState
from model.transformer import Transformer

SEEN_KEYS = 1 << 16
"""Prefixes that are remembered, so that one which comes again is kept."""


class Memory(ABC):
    """The state of all rows, and what is found in it of a prompt that begins like another.

    Args:
      grid: prefixes are kept at multiples of so many tokens.
      has_prefixes: whether any are.
    """

    def __init__(self, model: Transformer, size: StateSize, grid: int, has_prefixes: bool) -> None:
        self.state: ModelState = steps.empty_state(model, size)
        self.grid, self.has_prefixes = grid, has_prefixes
        self.queries = self.hits = 0
        self.seconds_per_token: float | None = None
        """That reading takes, as the engine measures it; beside what a page's copy takes, it says
        whether a prefix is copied or read anew."""
        self._under_way: dict[bytes, TokenSequence] = {}
        """Prefixes that some sequence is about to have read."""

    @property
    def tables_RN(self) -> np.ndarray | None:
        """The pages of each row, a copy; None without pages."""
        return None

    def is_awaited(self, sequence: TokenSequence) -> bool:
        """Whether another sequence is about to read what this one begins with, too."""
        if not self._looks_up(sequence):
            return False
        keys = self._keys(sequence)
        for end in range(len(keys), 0, -1):
            owner = self._under_way.get(keys[end - 1])
            if owner is not None and owner.read < end * self.grid:
                self._is_wanted(owner, end * self.grid)
                return True
        return False

    def place(self, sequence: TokenSequence, row: int, num_running: int) -> bool:
        """Gives a sequence a row, and what is there of its prefix; False: there is no room yet."""
        if not self._place(sequence, row, num_running):
            return False
        sequence.row = row
        if self._looks_up(sequence):
            self.queries += len(sequence.prompt)
            self.hits += min(sequence.read, len(sequence.prompt))
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.read, len(sequence.prompt))
        if self.has_prefixes:
            for i, key in enumerate(self._keys(sequence)):
                if (i + 1) * self.grid > sequence.read:
                    self._under_way.setdefault(key, sequence)
        return True

    def advance(self, sequence: TokenSequence) -> None:
        """Told when a sequence has read more: what is whole now may be kept."""
        if not self.has_prefixes:
            return
        for key in self._keys(sequence)[: sequence.read // self.grid]:
            if self._under_way.get(key) is sequence:
                del self._under_way[key]
        self._keep(sequence)

    def free(self, sequence: TokenSequence, *, is_broken: bool = False) -> None:
        """The row and the pages of a sequence are others' from now on.

        Args:
          is_broken: nothing of it is to be found again.
        """
        if self.has_prefixes:
            for key in self._keys(sequence):
                if self._under_way.get(key) is sequence:
                    del self._under_way[key]
        self._free(sequence, is_broken)
        sequence.row, sequence.read = -1, 0

    def room(self, sequence: TokenSequence) -> int:
        """Tokens that it could read now."""
        return len(sequence.prompt) + sequence.request.max_new_tokens - sequence.read

    def programs(self) -> list[Callable[[], None]]:
        """All that it runs, on a row that nobody has."""
        return []

    @abstractmethod
    def grow(self, sequence: TokenSequence, length: int) -> bool:
        """Makes room for so many of its tokens; False: there is none."""

    @abstractmethod
    def _place(self, sequence: TokenSequence, row: int, num_running: int) -> bool: ...

    @abstractmethod
    def _keep(self, sequence: TokenSequence) -> None: ...

    @abstractmethod
    def _free(self, sequence: TokenSequence, is_broken: bool) -> None: ...

    def _is_wanted(self, owner: TokenSequence, length: int) -> None:
        """Another sequence waits for the first tokens of this one."""
        del owner, length

    def _looks_up(self, sequence: TokenSequence) -> bool:
        request = sequence.request
        return self.has_prefixes and not (request.prompt_logprobs or request.wants_experts)

    def _keys(self, sequence: TokenSequence) -> list[bytes]:
        """Of the prompt's whole pages; at least one token of what is known is left to be read."""
        length = min(len(sequence.prompt), sequence.known - 1)
        return sequence.page_keys(length // self.grid, self.grid)


class PagedMemory(Memory):
    """Pages that sequences share."""

    def __init__(
        self,
        model: Transformer,
        size: StateSize,
        has_prefixes: bool,
        row_length: int,
        tiers: Tiers | None = None,
    ) -> None:
        super().__init__(model, size, size.page_size, has_prefixes)
        assert size.num_pages is not None
        self.pool = PagePool(size.num_pages, self._keep_in_host)
        self._tiers, self._pages = tiers or Tiers(None, None), Pages(self.state)
        self._copy_seconds: float | None = None
        self._tables_RN = np.zeros((size.num_rows, -(-row_length // self.grid)), np.int32)

    @property
    def tables_RN(self) -> np.ndarray:
        return self._tables_RN.copy()  # programs may still read it while it changes

    def _place(self, sequence: TokenSequence, row: int, num_running: int) -> bool:
        found = []
        if self._looks_up(sequence):
            keys = sequence.page_keys((sequence.known - 1) // self.grid, self.grid)
            found = self.pool.find(keys)
        needed = -(-max(len(sequence.prompt), 1) // self.grid) - len(found)
        left = self.pool.num_free - self.pool.num_kept(found) - max(needed, 0)
        if left < num_running:  # each may want a page soon
            return False
        self.pool.hold(found)
        found = [*found, *self._copied_in(sequence, len(found))]
        sequence.pages, sequence.num_shared = list(found), len(found)
        sequence.num_kept, sequence.read = len(found), len(found) * self.grid
        self._tables_RN[row] = 0
        self._tables_RN[row, : len(found)] = found
        sequence.row = row
        has_room = self.grow(sequence, len(sequence.prompt))
        assert has_room
        return True

    def _copied_in(self, sequence: TokenSequence, begin: int) -> list[int]:
        """Pages of the prompt from the host or the disk, the first of them at `begin`."""
        if not self._looks_up(sequence) or not self._pays_to_copy():
            return []
        units: list[bytes] = []
        began = time.monotonic()
        for key in self._keys(sequence)[begin:]:
            unit = self._tiers.get(key)
            if unit is None:
                break
            units.append(unit)
        pages: list[int] = []
        for key in self._keys(sequence)[begin : begin + len(units)]:
            page = self.pool.take()
            assert page is not None  # the prompt has room
            self.pool.name(page, key)
            pages.append(page)
        if units:
            self.state = self._pages.copy_in(self.state, pages, units)
            jax.block_until_ready(self.state)
            seconds = (time.monotonic() - began) / len(units)
            self._copy_seconds = mean_of(self._copy_seconds, seconds)
        return pages

    def _pays_to_copy(self) -> bool:
        if self._copy_seconds is None or self.seconds_per_token is None:
            return True
        return self._copy_seconds < self.seconds_per_token * self.grid

    def _keep_in_host(self, page: int, key: bytes) -> None:
        if self._tiers.has_host():
            self._tiers.keep_in_host(key, self._pages.copy_out(self.state, [page])[0])

    def programs(self) -> list[Callable[[], None]]:
        def copy_out_and_in() -> None:
            self.state = self._pages.copy_in(self.state, [0], self._pages.copy_out(self.state, [0]))

        return [copy_out_and_in] if self._tiers.has_host() or self._tiers.has_disk() else []

    def grow(self, sequence: TokenSequence, length: int) -> bool:
        while len(sequence.pages) * self.grid < length:
            page = self.pool.take()
            if page is None:
                return False
            self._tables_RN[sequence.row, len(sequence.pages)] = page
            sequence.pages.append(page)
        return True

    def room(self, sequence: TokenSequence) -> int:
        return len(sequence.pages) * self.grid - sequence.read

    def _keep(self, sequence: TokenSequence) -> None:
        keys = sequence.page_keys(sequence.read // self.grid, self.grid)
        new = range(sequence.num_kept, len(keys))
        named = [i for i in new if self.pool.name(sequence.pages[i], keys[i])]
        named = [i for i in named if (i + 1) * self.grid <= len(sequence.prompt)]
        if named and self._tiers.has_disk():
            units = self._pages.copy_out(self.state, [sequence.pages[i] for i in named])
            for i, unit in zip(named, units, strict=True):
                self._tiers.keep_on_disk(keys[i], unit)
        sequence.num_kept = max(sequence.num_kept, len(keys))

    def _free(self, sequence: TokenSequence, is_broken: bool) -> None:
        if is_broken:
            for page in sequence.pages[sequence.num_shared :]:
                self.pool.forget(page)
        self.pool.release(sequence.pages)
        self._tables_RN[sequence.row] = 0
        sequence.pages, sequence.num_kept = [], 0


class RowMemory(Memory):
    """Slots of each row's own; the whole state after a prefix is kept, as each layer has it.

    States are kept where a prompt ends, and where another began alike: on a grid of tokens, which
    recurrent layers read in whole blocks.
    """

    def __init__(
        self,
        model: Transformer,
        size: StateSize,
        has_prefixes: bool,
        grid: int,
        most_bytes: int,
        tiers: Tiers | None = None,
    ) -> None:
        super().__init__(model, size, grid, has_prefixes)
        self._tiers, self._rows = tiers or Tiers(None, None), Rows(self.state)
        self._most_bytes, self._bytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[ModelState, int]] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def grow(self, sequence: TokenSequence, length: int) -> bool:
        del sequence, length
        return True

    def _place(self, sequence: TokenSequence, row: int, num_running: int) -> bool:
        del num_running
        sequence.read = 0
        if not self.has_prefixes:
            return True
        keys = self._keys(sequence)
        if self._looks_up(sequence):
            for end in range(len(keys), 0, -1):
                kept = self._kept_state(keys[end - 1])
                if kept is not None:
                    self.state = put_row(self.state, np.array([row], np.int32), kept)
                    sequence.read = end * self.grid
                    break
        known = next((i for i in range(len(keys), 0, -1) if keys[i - 1] in self._seen), 0)
        sequence.stops = {end * self.grid for end in (known, len(keys))} - {0}
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN_KEYS:
            self._seen.popitem(last=False)
        return True

    def _kept_state(self, key: bytes) -> ModelState | None:
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key][0]
        unit = self._tiers.get(key)
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

    def programs(self) -> list[Callable[[], None]]:
        row_1 = np.zeros(1, np.int32)

        def take_and_put() -> None:
            kept = take_row(self.state, row_1)
            self.state = put_row(self.state, row_1, kept)

        return [take_and_put] if self.has_prefixes else []

    def _is_wanted(self, owner: TokenSequence, length: int) -> None:
        owner.stops.add(length)

    def _keep(self, sequence: TokenSequence) -> None:
        length, keys = sequence.read, self._keys(sequence)
        if length not in sequence.stops or length // self.grid > len(keys):
            return
        key = keys[length // self.grid - 1]
        if key in self._states:
            return
        kept = take_row(self.state, np.array([sequence.row], np.int32))
        self._hold(key, kept)
        if self._tiers.has_disk():
            self._tiers.keep_on_disk(key, self._rows.to_bytes(kept))

    def _free(self, sequence: TokenSequence, is_broken: bool) -> None:
        if is_broken:
            for key in self._keys(sequence):
                kept = self._states.pop(key, None)
                self._bytes -= 0 if kept is None else kept[1]


def mean_of(mean: float | None, new: float) -> float:
    """A mean that forgets: a fifth of it is the newest."""
    return new if mean is None else 0.8 * mean + 0.2 * new
