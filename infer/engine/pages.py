"""The pages that sequences share: who holds which, and which hold a prefix that may come again.

A page is free, held by one or more sequences, or free but kept: it holds a whole page of a known
prefix, and is given away last, the one that was longest unused first. Page 0 belongs to nobody.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Plain bookkeeping: it knows numbers of pages, and nothing of what lies in them.

    Args:
      num_pages: page 0 among them.
      on_evict: called with a kept page and its key, before the page is given to somebody else.
    """

    def __init__(
        self, num_pages: int, on_evict: Callable[[int, bytes], None] = lambda *_: None
    ) -> None:
        self.num_pages, self._on_evict = num_pages, on_evict
        self._free = deque(range(1, num_pages))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free pages with a key, the longest unused first."""
        self._holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._kept)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of these keys up to the first that is not there; none is taken."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_kept(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds: to hold them makes as many fewer free."""
        return sum(not self._holders[page] for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which `find` gave."""
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)

    def take(self) -> int | None:
        """A page for one holder; None if there is none."""
        if self._free:
            page = self._free.popleft()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._on_evict(page, self._key_of[page])
            self.forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; the end of a prefix is given away before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, key: bytes) -> bool:
        """Says what a held page holds, whole and for good; False if another page holds that."""
        if key in self._page_of:
            return False
        self._page_of[key], self._key_of[page] = page, key
        return True

    def forget(self, page: int) -> None:
        """What the page holds is not to be found again."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
            if page in self._kept:
                del self._kept[page]
                self._free.append(page)

    def check(self) -> None:
        """
        Raises:
          AssertionError: a page that is lost, or in two places.
        """
        held = {page for page in range(1, self.num_pages) if self._holders[page]}
        places = [set(self._free), set(self._kept), held]
        assert sum(map(len, places)) == len(set.union(*places)) == self.num_pages - 1
        assert len(self._free) == len(set(self._free))
        assert self._holders[0] == 0
        assert all(page in self._key_of for page in self._kept)
        assert {key: page for page, key in self._key_of.items()} == self._page_of
