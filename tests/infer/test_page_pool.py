"""The pool of pages against a naive list of what every page is, over random operations."""

import numpy as np
import pytest

from infer.engine.keys import next_key, root_key
from infer.engine.options import EngineOptions
from infer.engine.pages import PagePool
from infer.engine.programs import WholeModel
from infer.engine.reading import Reader, fair_shares
from infer.engine.types import Request
from infer.steps import StateSize
from model.transformer import Transformer
from tests import tiny

NUM_PAGES = 9


class Naive:
    """Pages with a key and nobody in order of their last release."""

    def __init__(self):
        self.key_of, self.holders, self.released = {}, dict.fromkeys(range(1, NUM_PAGES), 0), []

    def is_right_to_take(self, page):
        """A page without a key first, else the one released longest ago."""
        free = [p for p, n in self.holders.items() if not n]
        blank = [p for p in free if p not in self.key_of]
        if blank:
            return page in blank
        kept = [p for p in self.released if p in free]
        return page == (kept[0] if kept else None)

    def release(self, page):
        self.holders[page] -= 1
        self.released = [p for p in self.released if p != page] + [page]


def test_ten_thousand_random_operations():
    random, evicted = np.random.RandomState(0), []
    pool = PagePool(NUM_PAGES, on_evict=lambda page, key: evicted.append((page, key)))
    naive, held, keys = Naive(), [], [bytes([i]) for i in range(14)]
    for _ in range(10_000):
        action = random.randint(4)
        if action == 0:
            evicted.clear()
            page = pool.take()
            assert (page is None) == (not any(n == 0 for n in naive.holders.values()))
            if page is not None:
                assert naive.is_right_to_take(page)
                assert evicted == ([(page, naive.key_of.pop(page))] if evicted else [])
                assert page not in naive.key_of
                naive.holders[page] = 1
                held.append(page)
        elif action == 1 and held:
            page = held.pop(random.randint(len(held)))
            pool.release([page])
            naive.release(page)
        elif action == 2 and held:
            page, key = held[random.randint(len(held))], keys[random.randint(len(keys))]
            if page not in naive.key_of:
                is_new = key not in naive.key_of.values()
                assert pool.name(page, key) == is_new
                if is_new:
                    naive.key_of[page] = key
        elif action == 3:
            key = keys[random.randint(len(keys))]
            found = pool.find([key])
            assert found == [p for p, k in naive.key_of.items() if k == key]
            pool.hold(found)
            held += found
            for page in found:
                naive.holders[page] += 1
        assert pool.num_free == sum(n == 0 for n in naive.holders.values())
        pool.check()


def test_the_end_of_a_prefix_goes_before_its_beginning():
    pool = PagePool(4)
    pages = [pool.take() for _ in range(3)]
    for page in pages:
        pool.name(page, bytes([page]))
    pool.release(pages)
    assert [pool.take() for _ in range(3)] == pages[::-1]
    assert pool.take() is None


def test_keys_tell_apart_whatever_a_page_depends_on():
    """Model, salt, preference, every token before, and which of them were read one by one."""
    wanted = {"layer_0": np.ones((1, 1, 4), np.float32)}
    requests = [
        Request([1], 1),
        Request([1], 1, cache_salt="a"),
        Request([1], 1, preference=wanted),
        Request([1], 1, preference={"layer_1": wanted["layer_0"]}),
    ]
    roots = [root_key(identity, r) for identity in (b"one", b"other") for r in requests]
    pages = [next_key(r, tokens, 2) for r in roots for tokens in ([1, 2], [1, 3], [2, 1])]
    later = [next_key(p, [5, 6], count) for p in pages for count in (0, 1, 2)]
    found = [*roots, *pages, *later]
    assert len(set(found)) == len(found)
    assert root_key(b"one", Request([9, 9], 7)) == roots[0]


@pytest.mark.parametrize(
    ("budget", "wants", "shares"),
    [
        (10, [], []),
        (10, [3, 4], [3, 4]),
        (10, [100, 2, 100], [4, 2, 4]),
        (10, [100, 100, 100], [4, 3, 3]),
        (2, [5, 5, 5], [1, 1, 0]),
    ],
)
def test_nobody_gets_more_than_another_who_still_wants(budget, wants, shares):
    assert fair_shares(budget, wants) == shares


def test_a_step_reads_what_its_time_allows():
    """Whole programs, one at least, `piece` tokens at most."""
    options = EngineOptions(piece=512, block=128, target_seconds=0.5)
    model = Transformer(tiny.model())
    reader = Reader(WholeModel(model, {}), options, StateSize(8, 1024, "float32"))
    budgets = []
    for seconds in (None, 1e-4, 1e-3, 1.4e-3, 3e-3, 1.0):
        reader.seconds_per_token = seconds
        budgets.append(reader.budget())
    assert budgets == [512, 512, 384, 256, 128, 128]
