"""Samples a second of an evaluation, in batches and one at a time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from configs.checks import require
from evals.local_model import LocalModel
from evals.samples import Choices, Load, Prompt, Sample, Task


@dataclass(frozen=True)
class Throughput:
    """Of one task."""

    task: str
    count: int
    """Samples of a round."""
    batched: float
    """Samples a second, the median of the rounds."""
    alone: float
    ratio: float
    """Of the two, the median of the rounds' ratios."""


def measure(model: LocalModel, task: Task, limit: int, rounds: int) -> Throughput:
    """Alternating rounds after one of each that compiles.

    One at a time is a call for each request, as a batch of one: each choice of a question with its
    context, or each prompt.
    """
    samples = list(task.load(Load(task.num_fewshot, 0, limit)))[:limit]
    single = replace(model, max_rows=1)
    ways = (lambda: _together(model, samples), lambda: _alone(single, samples))
    for way in ways:
        way()
    times = [[_seconds(way) for way in ways] for _ in range(rounds)]
    together, alone = (statistics.median(t) for t in zip(*times, strict=True))
    count = len(samples)
    ratio = statistics.median(b / a for a, b in times)
    return Throughput(task.name, count, count / together, count / alone, ratio)


def _together(model: LocalModel, samples: Sequence[Sample]) -> None:
    choices = [s for s in samples if isinstance(s, Choices)]
    prompts = [s for s in samples if isinstance(s, Prompt)]
    require(
        len(choices) + len(prompts) == len(samples),
        "bits per byte are of whole texts, read in batches anyway: name a task of questions",
    )
    model.log_likelihoods([(s.context, choice) for s in choices for choice in s.choices])
    model.generate(prompts)


def _alone(model: LocalModel, samples: Sequence[Sample]) -> None:
    for sample in samples:
        if isinstance(sample, Choices):
            for choice in sample.choices:
                model.log_likelihoods([(sample.context, choice)])
        elif isinstance(sample, Prompt):
            model.generate([sample])


def _seconds(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def print_throughput(found: Throughput) -> None:
    print(
        f"{found.task}: {found.batched:.3g} samples/s in batches, {found.alone:.3g} one at a time: "
        f"{found.ratio:.2f} times ({found.count} samples)",
        flush=True,
    )
