"""What the model keeps of each sequence, in rows of slots or in pages, and of prefixes for later.

R rows (sequences), N pages of a row.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from infer import steps
from infer.engine.pages import PagePool
from infer.engine.sequence import TokenSequence
from infer.steps import StateSize
from model.model_state import ModelState, put_rows, take_rows
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
        return self.has_prefixes and not sequence.request.prompt_logprobs

    def _keys(self, sequence: TokenSequence) -> list[bytes]:
        """Of the prompt's whole pages; at least one token of what is known is left to be read."""
        length = min(len(sequence.prompt), sequence.known - 1)
        return sequence.page_keys(length // self.grid, self.grid)


class PagedMemory(Memory):
    """Pages that sequences share."""

    def __init__(
        self, model: Transformer, size: StateSize, has_prefixes: bool, row_length: int
    ) -> None:
        super().__init__(model, size, size.page_size, has_prefixes)
        assert size.num_pages is not None
        self.pool = PagePool(size.num_pages)
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
        sequence.pages, sequence.num_shared = list(found), len(found)
        sequence.num_kept, sequence.read = len(found), len(found) * self.grid
        self._tables_RN[row] = 0
        self._tables_RN[row, : len(found)] = found
        sequence.row = row
        has_room = self.grow(sequence, len(sequence.prompt))
        assert has_room
        return True

    def grow(self, sequence: TokenSequence, length: int) -> bool:
        while len(sequence.pages) * self.grid < length:
            page = self.pool.take()
            if page is None:
                return False
            self._tables_RN[sequence.row, len(sequence.pages)] = page
            sequence.pages.append(page)
        return True

    def _keep(self, sequence: TokenSequence) -> None:
        keys = sequence.page_keys(sequence.read // self.grid, self.grid)
        for i in range(sequence.num_kept, len(keys)):
            self.pool.name(sequence.pages[i], keys[i])
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
        self, model: Transformer, size: StateSize, has_prefixes: bool, grid: int, most_bytes: int
    ) -> None:
        super().__init__(model, size, grid, has_prefixes)
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
                kept = self._states.get(keys[end - 1])
                if kept is not None:
                    self._states.move_to_end(keys[end - 1])
                    self.state = _put_row(self.state, np.array([row], np.int32), kept[0])
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

    def programs(self) -> list[Callable[[], None]]:
        row_1 = np.zeros(1, np.int32)

        def take_and_put() -> None:
            self.state = _put_row(self.state, row_1, _take_row(self.state, row_1))

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
        kept = _take_row(self.state, np.array([sequence.row], np.int32))
        size = sum(x.nbytes for x in jax.tree.leaves(kept))
        self._states[key], self._bytes = (kept, size), self._bytes + size
        while self._bytes > self._most_bytes:
            _, (_, size) = self._states.popitem(last=False)
            self._bytes -= size

    def _free(self, sequence: TokenSequence, is_broken: bool) -> None:
        if is_broken:
            for key in self._keys(sequence):
                kept = self._states.pop(key, None)
                self._bytes -= 0 if kept is None else kept[1]


_take_row = jax.jit(take_rows)


@partial(jax.jit, donate_argnums=0)
def _put_row(state: ModelState, row_1: jax.Array, kept: ModelState) -> ModelState:
    return steps.laid_out(put_rows(state, row_1, kept))
