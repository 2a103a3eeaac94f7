"""Two models on the same samples: differences with their intervals, and whether they could be luck.

A sample's difficulty is common to both models, so differences are taken sample by sample: their
interval is narrower than the two scores' standard errors make believe.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.serialization import finite_json
from evals.aggregation import aggregate, moments, values_of
from evals.records import Record
from evals.results_form import TaskScores
from evals.samples import Metric, Task
from evals.scoring import Value
from formats.atomic_folder import replace_text

NUM_RESAMPLES = 10_000
LEVEL = 0.95
"""Of the interval."""


@dataclass(frozen=True)
class Difference:
    """A metric of a task for a model and for the one it is compared with."""

    task: str
    metric: Metric
    value: float
    against: float
    difference: float
    """value - against."""
    low: float
    high: float
    """The interval that holds LEVEL of the resampled differences."""
    count: int
    """Samples that both have."""
    only_first: int | None = None
    """Samples right in the first model alone; None where samples are not right or wrong."""
    only_second: int | None = None
    p_value: float | None = None
    """Of an exact McNemar test: so unequal or more with equally good models."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def tree(self) -> dict[str, Any]:
        """As comparison.json has it."""
        return {
            "task": self.task,
            "metric": self.metric.name,
            "filter": self.metric.filter,
            "higher_is_better": self.metric.higher_is_better,
            "value": self.value,
            "against": self.against,
            "difference": self.difference,
            "interval": [self.low, self.high],
            "level": LEVEL,
            "num_samples": self.count,
            "only_first_right": self.only_first,
            "only_second_right": self.only_second,
            "mcnemar_p": self.p_value,
        }


def compare(first: Sequence[TaskScores], second: Sequence[TaskScores]) -> list[Difference]:
    """The differences of every task that both have samples of."""
    theirs = {found.task.name: found for found in second}
    differences = []
    for found in first:
        if found.task.name in theirs:
            other = theirs[found.task.name]
            differences += compare_records(found.task, found.records, other.records)
    return differences


def compare_records(
    task: Task, first: Sequence[Record], second: Sequence[Record]
) -> list[Difference]:
    """The differences of each metric over the samples that both have, unchanged."""
    theirs = {(r.key, r.draw): r for r in second}
    pairs = [(r, theirs[r.key, r.draw]) for r in first if (r.key, r.draw) in theirs]
    pairs = [(a, b) for a, b in pairs if _content(a) == _content(b)]
    found = []
    for metric in task.metrics:
        values = [
            (a.values[metric], b.values[metric])
            for a, b in pairs
            if metric in a.values and metric in b.values
        ]
        if values:
            found.append(paired(task.name, metric, values))
    return found


def _content(record: Record) -> Any:
    """What must be equal: of a text in a model's own tokens its name and bytes, as other models
    have other tokens."""
    document = record.lines[0]["doc"]
    is_tokens = "tokens_sha256" in document
    return (record.key, document["num_bytes"]) if is_tokens else record.sample_hash


def paired(task: str, metric: Metric, pairs: Sequence[tuple[Value, Value]]) -> Difference:
    """The difference of two models in one metric.

    Args:
      pairs: each sample's value in the first and in the second.
    """
    value, against = (
        aggregate(metric, [{str(i): x for i, x in enumerate(side)}]).value
        for side in zip(*pairs, strict=True)
    )
    low, high = bootstrap_interval(metric, pairs)
    made = Difference(task, metric, value, against, value - against, low, high, len(pairs))
    if not all(isinstance(x, float) and x in (0.0, 1.0) for pair in pairs for x in pair):
        return made
    ours = sum(pair == (1.0, 0.0) for pair in pairs)
    theirs = sum(pair == (0.0, 1.0) for pair in pairs)
    return dataclasses.replace(
        made, only_first=ours, only_second=theirs, p_value=mcnemar(ours, theirs)
    )


def bootstrap_interval(
    metric: Metric, pairs: Sequence[tuple[Value, Value]], *, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the difference over samples drawn again, both models' together."""
    sides = [moments(metric, side) for side in zip(*pairs, strict=True)]
    values = np.stack(sides, axis=1)  # [N, 2, M]
    count, random = len(values), np.random.default_rng(seed)
    # Equal samples are drawn together: of right and wrong there are but four kinds.
    kinds, numbers = np.unique(values, axis=0, return_counts=True)
    differences = []
    for _ in range(NUM_RESAMPLES // 100):
        weights = random.multinomial(count, numbers / count, size=100)
        sums = np.tensordot(weights, kinds, 1)
        differences.append(values_of(metric, sums[:, 0]) - values_of(metric, sums[:, 1]))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(differences), [tail, 100 - tail])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of an exact McNemar test: the binomial one of the samples that differ."""
    count, least = only_first + only_second, min(only_first, only_second)
    if not count:
        return 1.0
    below = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * below / 2**count)


def write_comparison(
    folder: Path,
    first: str,
    second: str,
    ours: Sequence[TaskScores],
    theirs: Sequence[TaskScores],
) -> list[Difference]:
    """Writes comparison.json; the differences of the two models."""
    differences = compare(ours, theirs)
    tree = {
        "model": first,
        "against": second,
        "num_resamples": NUM_RESAMPLES,
        "differences": [each.tree() for each in differences],
    }
    replace_text(folder / "comparison.json", finite_json(tree, indent=2) + "\n")
    return differences
