"""Examples shown before a question, and the order in which a task's questions are asked.

Data sets that come as one split keep some of their questions for examples: these are never scored,
whatever the number of examples, so that the same questions are scored with each.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from configs.checks import require
from evals.samples import Choices, Load, Sample

S = TypeVar("S", bound=Sample)

POOL = 32
"""Questions kept for examples."""


def by_hash(samples: Iterable[S]) -> list[S]:
    """In an order that has nothing to do with the file's: the first ones stand for all."""
    return sorted(samples, key=lambda s: hashlib.sha256(s.key.encode()).digest())


def split_pool(samples: Iterable[S], size: int = POOL) -> tuple[list[S], list[S]]:
    """The questions kept for examples, and those to be scored, both in the order of `by_hash`.

    A question that reads like one of the examples is not scored.
    """
    ordered = by_hash(samples)
    require(
        len(ordered) > size,
        f"{len(ordered)} questions are too few: {size} are kept for examples",
    )
    kept = ordered[:size]
    shown = {s.context for s in kept if isinstance(s, Choices)}
    return kept, [s for s in ordered[size:] if getattr(s, "context", None) not in shown]


def draw(pool: Sequence, load: Load) -> list:
    """load.num_fewshot of them, by load.seed; the same for all questions, so that their tokens are
    computed once."""
    require(
        0 <= load.num_fewshot <= len(pool),
        f"--num-fewshot {load.num_fewshot} must be from 0 to {len(pool)}, the examples there are",
    )
    return random.Random(f"few-shot {load.seed}").sample(list(pool), load.num_fewshot)


def with_shots(
    samples: Sequence[Choices], shots: Sequence[Choices], intro: str = ""
) -> list[Choices]:
    """Each question after the examples and their answers, an empty line between them.

    Args:
      intro: stands before everything.
    """
    shown = intro + "".join(f"{s.context}{s.choices[s.answer]}\n\n" for s in shots)
    return [dataclasses.replace(s, context=shown + s.context) for s in samples]


def choices_with_shots(
    samples: Iterable[Choices],
    load: Load,
    *,
    intro: str = "",
    most: int | None = None,
    pool: int = POOL,
) -> list[Choices]:
    """The scored questions of a data set of one split, after examples drawn from its pool.

    Args:
      most: questions at most, the first by hash.
      pool: questions kept for examples.
    """
    kept, rest = split_pool(samples, pool)
    first = rest[: least(most, load.limit)]
    return with_shots(first, draw(kept, load), intro)


def least(*limits: int | None) -> int | None:
    """The smallest of the limits that there are."""
    return min((limit for limit in limits if limit is not None), default=None)
