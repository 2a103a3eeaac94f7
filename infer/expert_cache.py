"""Which experts of a layer are resident, and what a policy costs on a trace of routing.

A trace is one layer's list of steps, each the distinct experts that the step's tokens went to; all
of a step's experts must be resident at once. An expert that is not has to be brought: on demand,
while the step waits, or ahead, by a forecast. Belady's rule (1966), which knows the future and
gives up what is needed last, brings the fewest; no rule that brings on demand or ahead brings less.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from configs.checks import require

Policy = Literal["lru", "lfu"]
"""What gives way: what was used longest ago, or least often (of late)."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
DECAY = 0.98
"""Of a count of uses, with each step: after 34 steps a use counts half."""
LARGEST_UNIT = 1e100

Trace = Sequence[Sequence[int]]


@dataclass
class PagingCounts:
    """What a layer's steps asked for and what was brought."""

    requests: int = 0
    """Distinct experts of each step, summed."""
    on_demand: int = 0
    """Brought while a step waited."""
    ahead: int = 0
    """Brought before a step asked."""
    forecast: int = 0
    """Requests of steps that had a forecast."""
    foretold: int = 0
    """Those of them that it named."""

    @property
    def accuracy(self) -> float | None:
        """The share of requests that forecasts named; None: there were none."""
        return self.foretold / self.forecast if self.forecast else None

    @property
    def ready_rate(self) -> float:
        """The share of requests whose expert was there; a forecast may have brought it."""
        return 1 - self.on_demand / max(self.requests, 1)

    @property
    def hit_rate(self) -> float:
        """The share of requests that nothing was brought for: what Belady's rule bounds. Below 0
        where wrong forecasts bring more than is asked for."""
        return 1 - (self.on_demand + self.ahead) / max(self.requests, 1)

    def as_tree(self) -> dict[str, float | None]:
        """For programs: what was counted, and the shares."""
        names = ("hit_rate", "ready_rate", "accuracy")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}

    def __add__(self, other: "PagingCounts") -> "PagingCounts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return PagingCounts(*(mine + more for mine, more in pairs))


@dataclass
class SlotTable:
    """The slots of one layer and the experts in them; nothing is moved here, only said.

    Raises:
      UserError: no slot.
    """

    num_slots: int
    policy: Policy = "lru"
    counts: PagingCounts = field(default_factory=PagingCounts)
    slots: dict[int, int] = field(default_factory=dict)
    """Expert to slot, of those resident."""
    _expected: frozenset[int] | None = None
    """What the last forecast named."""
    _uses: dict[int, float] = field(default_factory=dict)
    _last: dict[int, int] = field(default_factory=dict)
    _time: int = 0
    _unit: float = 1.0
    """What a use now counts: it grows, which is the same as letting older ones decay."""

    def __post_init__(self) -> None:
        require(self.num_slots >= 1, f"{self.num_slots} resident experts: at least 1 is needed")

    def use(self, experts: Iterable[int]) -> list[tuple[int, int]]:
        """A step's experts: those to be brought now, each with its slot.

        Raises:
          ValueError: more experts than slots.
        """
        wanted = list(dict.fromkeys(experts))
        self._time += 1
        self._age()
        brought = self._bring(wanted, keep=frozenset(wanted))
        self.counts.requests += len(wanted)
        self.counts.on_demand += len(brought)
        if self._expected is not None:
            self.counts.forecast += len(wanted)
            self.counts.foretold += len(self._expected.intersection(wanted))
        for expert in wanted:
            self._uses[expert] = self._uses.get(expert, 0.0) + self._unit
            self._last[expert] = self._time
        return brought

    def expect(self, experts: Iterable[int]) -> list[tuple[int, int]]:
        """Forecast experts, the surest first: those to be brought ahead, each with its slot."""
        named = list(dict.fromkeys(experts))
        self._expected, wanted = frozenset(named), named[: self.num_slots]
        brought = self._bring(wanted, keep=frozenset(wanted))
        self.counts.ahead += len(brought)
        return brought

    def groups(self, experts: Iterable[int]) -> list[list[int]]:
        """A step's experts as they have room together: those that are there first, where there is
        none for all."""
        wanted = list(dict.fromkeys(experts))
        if len(wanted) <= self.num_slots:
            return [wanted] if wanted else []
        there = [expert for expert in wanted if expert in self.slots]
        missing = [expert for expert in wanted if expert not in self.slots]
        pieces = [missing[i : i + self.num_slots] for i in range(0, len(missing), self.num_slots)]
        return [there, *pieces] if there else pieces

    def fill(self) -> list[tuple[int, int]]:
        """The first experts, where all slots are empty: nothing has asked for them."""
        return [] if self.slots else self._bring(list(range(self.num_slots)), frozenset())

    def has(self, experts: Iterable[int]) -> bool:
        return all(expert in self.slots for expert in experts)

    def _age(self) -> None:
        self._unit /= DECAY
        if self._unit > LARGEST_UNIT:
            self._uses = {expert: uses / self._unit for expert, uses in self._uses.items()}
            self._unit = 1.0

    def _bring(self, wanted: list[int], keep: frozenset[int]) -> list[tuple[int, int]]:
        if len(wanted) > self.num_slots:
            raise ValueError(f"{len(wanted)} experts at once have no room in {self.num_slots}")
        brought = []
        for expert in wanted:
            if expert in self.slots:
                continue
            slot = len(self.slots)
            if slot == self.num_slots:
                victim = min((e for e in self.slots if e not in keep), key=self._worth)
                slot = self.slots.pop(victim)
            self.slots[expert] = slot
            brought.append((expert, slot))
        return brought

    def _worth(self, expert: int) -> tuple[float, int, int]:
        last = self._last.get(expert, 0)
        return (self._uses.get(expert, 0.0) if self.policy == "lfu" else 0.0, last, expert)


def simulate(
    trace: Trace, num_slots: int, policy: Policy = "lru", forecasts: Trace | None = None
) -> PagingCounts:
    """What a policy brings on a trace, from an empty cache.

    Args:
      forecasts: of each step, made before it; None: nothing is brought ahead.
    Raises:
      ValueError: a step of more experts than slots.
    """
    table = SlotTable(num_slots, policy)
    for place, experts in enumerate(trace):
        if forecasts is not None:
            table.expect(forecasts[place])
        table.use(experts)
    return table.counts


def belady(trace: Trace, num_slots: int) -> PagingCounts:
    """The least that can be brought on a trace, from an empty cache: what is needed last, or never
    again, gives way.

    Raises:
      ValueError: a step of more experts than slots.
    """
    steps = [list(dict.fromkeys(experts)) for experts in trace]
    next_use = _next_uses(steps)
    counts, resident = PagingCounts(), dict[int, float]()
    for place, experts in enumerate(steps):
        if len(experts) > num_slots:
            raise ValueError(f"{len(experts)} experts at once have no room in {num_slots}")
        counts.requests += len(experts)
        for expert in experts:
            if expert not in resident:
                counts.on_demand += 1
                if len(resident) == num_slots:
                    others = (e for e in resident if e not in experts)
                    del resident[max(others, key=resident.__getitem__)]
            resident[expert] = next_use(place, expert)
    return counts


def _next_uses(steps: list[list[int]]) -> Callable[[int, int], float]:
    """(place, expert) to the next place that asks for it; infinite: none."""
    found: list[dict[int, float]] = []
    coming: dict[int, float] = {}
    for place in range(len(steps) - 1, -1, -1):
        found.append({expert: coming.get(expert, float("inf")) for expert in steps[place]})
        coming |= dict.fromkeys(steps[place], place)
    found.reverse()
    return lambda place, expert: found[place][expert]
