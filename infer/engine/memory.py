"""What the model keeps of each sequence, in rows of slots or in pages, and of prefixes for later.

R rows (sequences), N pages of a row.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from infer import steps
from infer.engine.kept_states import KeptStates
from infer.engine.pages import PagePool
from infer.engine.sequence import TokenSequence
from infer.engine.tiers import Tiers
from infer.engine.units import Pages, put_row, take_row
from infer.steps import StateSize
from model.model_state import ModelState, has_rows
from model.transformer import Transformer


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
        self._states: KeptStates | None = None
        """After prefixes, where layers keep something in rows."""

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

        def take_and_put() -> None:
            row_1 = np.zeros(1, np.int32)
            self.state = put_row(self.state, row_1, take_row(self.state, row_1))

        return [] if self._states is None else [take_and_put]

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
        if self._states is not None:
            owner.stops.add(self._states.on_grid(length))

    def _stop_for_states(self, sequence: TokenSequence) -> None:
        """Has a prompt pause where its state is to be kept."""
        if self._states is not None:
            sequence.stops = self._states.note(self._keys(sequence))

    def _keep_state(self, sequence: TokenSequence) -> None:
        """Keeps what rows hold of a sequence, if it pauses for that."""
        keys = self._keys(sequence)[: sequence.read // self.grid]
        if self._states is not None and keys and sequence.read in sequence.stops:
            self._states.keep(keys[-1], self.state, sequence.row)

    def _drop_states(self, sequence: TokenSequence) -> None:
        """Nothing that rows held of a sequence is to be found again."""
        if self._states is not None:
            self._states.drop(self._keys(sequence))

    def _looks_up(self, sequence: TokenSequence) -> bool:
        request = sequence.request
        return self.has_prefixes and not (request.prompt_logprobs or request.wants_experts)

    def _keys(self, sequence: TokenSequence) -> list[bytes]:
        """Of the prompt's whole pages; at least one token of what is known is left to be read."""
        length = min(len(sequence.prompt), sequence.known - 1)
        return sequence.page_keys(length // self.grid, self.grid)


class PagedMemory(Memory):
    """Pages that sequences share, and rows of what layers keep beside them: a prefix is found
    where both its pages and the state after it are there.

    Args:
      state_bytes: of kept states at most, where layers keep something in rows.
    """

    def __init__(
        self,
        model: Transformer,
        size: StateSize,
        has_prefixes: bool,
        row_length: int,
        tiers: Tiers | None = None,
        state_bytes: int = 0,
    ) -> None:
        super().__init__(model, size, size.page_size, has_prefixes)
        assert size.num_pages is not None
        self.pool = PagePool(size.num_pages, self._keep_in_host)
        self._tiers, self._pages = tiers or Tiers(None, None), Pages(self.state)
        if has_prefixes and has_rows(self.state):
            self._states = KeptStates(self.state, state_bytes, self._tiers, self.grid)
        self._copy_seconds: float | None = None
        self._tables_RN = np.zeros((size.num_rows, -(-row_length // self.grid)), np.int32)

    @property
    def tables_RN(self) -> np.ndarray:
        return self._tables_RN.copy()  # programs may still read it while it changes

    def _place(self, sequence: TokenSequence, row: int, num_running: int) -> bool:
        keys: list[bytes] = []
        if self._looks_up(sequence):
            keys = sequence.page_keys((sequence.known - 1) // self.grid, self.grid)
        pages = self.pool.find(keys)
        if not self._has_room(sequence, pages, num_running):
            return False
        found = self._found(sequence, keys, pages)
        if len(found.pages) < len(pages) and not self._has_room(sequence, found.pages, num_running):
            return False
        self.pool.hold(found.pages)
        copied = self._copied_in(keys[len(found.pages) :], found.units)
        sequence.pages = [*found.pages, *copied]
        sequence.num_shared = sequence.num_kept = len(sequence.pages)
        sequence.read = len(sequence.pages) * self.grid
        self._tables_RN[row] = 0
        self._tables_RN[row, : len(sequence.pages)] = sequence.pages
        sequence.row = row
        if found.state is not None:
            self.state = put_row(self.state, np.array([row], np.int32), found.state)
        self._stop_for_states(sequence)
        has_room = self.grow(sequence, len(sequence.prompt))
        assert has_room
        return True

    def _has_room(self, sequence: TokenSequence, found: list[int], num_running: int) -> bool:
        """Whether a prompt's other pages are free, and one that each which runs may want soon."""
        needed = -(-max(len(sequence.prompt), 1) // self.grid) - len(found)
        left = self.pool.num_free - self.pool.num_kept(found) - max(needed, 0)
        return left >= num_running

    def _found(self, sequence: TokenSequence, keys: list[bytes], pages: list[int]) -> "_Found":
        """The longest prefix whose pages are here or in a tier, and whose state is kept if it needs
        one.

        Args:
          pages: those that are here.
        """
        units: list[bytes] = []
        if self._pays_to_copy():
            for key in self._keys(sequence)[len(pages) :] if keys else []:
                unit = self._tiers.get(key)
                if unit is None:
                    break
                units.append(unit)
        if self._states is None:
            return _Found(pages, units, None)
        end, state = self._states.longest(keys[: len(pages) + len(units)])
        return _Found(pages[:end], units[: max(end - len(pages), 0)], state)

    def _copied_in(self, keys: list[bytes], units: list[bytes]) -> list[int]:
        """Pages with the contents that the host or the disk had under these keys."""
        if not units:
            return []
        began, pages = time.monotonic(), []
        for key in keys[: len(units)]:
            page = self.pool.take()
            assert page is not None  # the prompt has room
            self.pool.name(page, key)
            pages.append(page)
        self.state = self._pages.copy_in(self.state, pages, units)
        jax.block_until_ready(self.state)
        self._copy_seconds = mean_of(self._copy_seconds, (time.monotonic() - began) / len(units))
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

        has_tiers = self._tiers.has_host() or self._tiers.has_disk()
        return [*super().programs(), *([copy_out_and_in] if has_tiers else [])]

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
        self._keep_state(sequence)

    def _free(self, sequence: TokenSequence, is_broken: bool) -> None:
        if is_broken:
            self._drop_states(sequence)
            for page in sequence.pages[sequence.num_shared :]:
                self.pool.forget(page)
        self.pool.release(sequence.pages)
        self._tables_RN[sequence.row] = 0
        sequence.pages, sequence.num_kept = [], 0


class RowMemory(Memory):
    """Slots of each row's own; the whole state after a prefix is kept, as each layer has it."""

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
        self._tiers = tiers or Tiers(None, None)
        if has_prefixes:
            self._states = KeptStates(self.state, most_bytes, self._tiers, grid)

    def grow(self, sequence: TokenSequence, length: int) -> bool:
        del sequence, length
        return True

    def _place(self, sequence: TokenSequence, row: int, num_running: int) -> bool:
        del num_running
        sequence.read = 0
        if self._states is not None and self._looks_up(sequence):
            end, kept = self._states.longest(self._keys(sequence))
            if kept is not None:
                self.state = put_row(self.state, np.array([row], np.int32), kept)
                sequence.read = end * self.grid
        self._stop_for_states(sequence)
        return True

    def _keep(self, sequence: TokenSequence) -> None:
        self._keep_state(sequence)

    def _free(self, sequence: TokenSequence, is_broken: bool) -> None:
        if is_broken:
            self._drop_states(sequence)


class _Found(NamedTuple):
    """What is there of a prompt's beginning."""

    pages: list[int]
    units: list[bytes]
    """Contents of the pages after those, from the host or the disk."""
    state: ModelState | None
    """After all of them, of layers that keep it in rows."""


def mean_of(mean: float | None, new: float) -> float:
    """A mean that forgets: a fifth of it is the newest."""
    return new if mean is None else 0.8 * mean + 0.2 * new
