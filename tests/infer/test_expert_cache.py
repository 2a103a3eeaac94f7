"""Which experts are resident: policies against list models, Belady's rule against all ways."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import UserError
from infer.expert_cache import (
    POLICIES,
    SlotTable,
    belady,
    simulate,
)

TRACES = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True), min_size=1, max_size=7
)


def fewest(trace, num_slots: int) -> int:
    """The least that any way brings: every set that may be resident after each step is tried."""

    @cache
    def cost(place: int, resident: frozenset) -> int:
        if place == len(trace):
            return 0
        wanted = frozenset(trace[place])
        others = resident - wanted
        kept = (
            frozenset(some)
            for count in range(min(num_slots - len(wanted), len(others)) + 1)
            for some in itertools.combinations(sorted(others), count)
        )
        return len(wanted - resident) + min(cost(place + 1, wanted | some) for some in kept)

    return cost(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(TRACES, st.integers(2, 4))
def test_belady_brings_as_few_as_any_way(trace, num_slots):
    assert belady(trace, num_slots).on_demand == fewest(trace, num_slots)


@settings(max_examples=100, deadline=None)
@given(TRACES, st.integers(2, 4), st.sampled_from(POLICIES), st.data())
def test_no_policy_brings_less_than_belady(trace, num_slots, policy, data):
    """With forecasts, right or wrong, too: what is brought ahead counts."""
    least = belady(trace, num_slots)
    sizes = {"min_size": len(trace), "max_size": len(trace)}
    drawn = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), **sizes))
    for forecasts in (None, drawn, trace):
        found = simulate(trace, num_slots, policy, forecasts)
        assert found.requests == least.requests
        assert found.on_demand + found.ahead >= least.on_demand
        assert found.hit_rate <= least.hit_rate
    assert found.ready_rate == 1.0  # the last forecast is the truth


def test_the_longest_unused_gives_way():
    rng, order, missed = np.random.default_rng(0), [], 0
    trace = [sorted(rng.choice(8, 2, replace=False).tolist()) for _ in range(400)]
    for step in trace:
        missed += sum(expert not in order for expert in step)
        for expert in step:
            order = [e for e in order if e != expert] + [expert]
        order = order[-4:]
    assert simulate(trace, 4, "lru").on_demand == missed


def test_what_is_used_often_stays_where_the_least_used_gives_way():
    """A scan over other experts between two uses of a favourite empties an LRU of it."""
    trace = [[0]] * 5 + [[i] for _ in range(20) for i in (1, 2, 3, 0)]
    assert simulate(trace, 3, "lfu").on_demand < simulate(trace, 3, "lru").on_demand


def test_uses_of_long_ago_count_less():
    table = SlotTable(2, "lfu")
    for _ in range(30):
        table.use([0])
    for _ in range(200):
        table.use([1])
    table.use([2])
    assert set(table.slots) == {1, 2}
    for _ in range(40_000):  # counts stay finite
        table.use([1])
    table.use([3])
    assert set(table.slots) == {1, 3}


def test_slots_are_never_shared_and_all_of_a_step_are_there():
    rng, table, held = np.random.default_rng(1), SlotTable(5, "lfu"), {}
    for _ in range(500):
        step = rng.choice(12, 3, replace=False).tolist()
        if rng.random() < 0.5:
            held |= {slot: e for e, slot in table.expect(rng.choice(12, 4).tolist())}
        held |= {slot: expert for expert, slot in table.use(step)}
        assert table.has(step)
        assert {expert: slot for slot, expert in held.items()} == table.slots
        assert sorted(table.slots.values()) == list(range(len(table.slots)))


def test_everything_resident_is_brought_once():
    trace = [[i % 6, (i * 5 + 1) % 6] for i in range(50)]
    for policy in POLICIES:
        assert simulate(trace, 6, policy).on_demand == 6
    assert belady(trace, 6).on_demand == 6


def test_forecasts_are_judged_by_what_they_name():
    trace, forecasts = [[0, 1], [2, 3]], [[0, 4], [3, 2]]
    assert simulate(trace, 2, "lru", forecasts).accuracy == 0.75
    assert simulate(trace, 2).accuracy is None


def test_a_step_that_has_no_room_is_cut():
    """What is there goes first, so that it is not brought a second time."""
    table = SlotTable(2)
    table.use([5, 3])
    assert table.groups([1, 3, 3]) == [[1, 3]]
    assert table.groups([0, 1, 2, 3, 4]) == [[3], [0, 1], [2, 4]]
    assert table.groups([]) == []


def test_more_experts_than_slots_are_refused():
    for run in (simulate, belady):
        with pytest.raises(ValueError, match="3 experts at once have no room in 2"):
            run([[0, 1, 2]], 2)
    with pytest.raises(UserError, match="at least 1 is needed"):
        SlotTable(0)
