"""A task's input (the model under test) and its result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from configs.checks import UserError
from data.packing import TokenFile
from infer.run_weights import RunWeights
from infer.score import TokenScores

Score = Callable[[list[np.ndarray]], list[TokenScores]]
"""Scores documents (int32 tokens) with the model under test; see infer/score.py."""


class NotApplicable(UserError):
    """The task has nothing to measure on this run; the sentence says why."""


@dataclass(frozen=True)
class ModelUnderTest:
    """A trained model as a task sees it."""

    score: Score
    length: int
    """Tokens the model reads at once."""
    tokenizer: Tokenizer
    token_counts_V: np.ndarray
    """Occurrences of each token in the training text, int64."""
    held_out: TokenFile


@dataclass(frozen=True)
class Skipped:
    """A task that does not apply to the run."""

    task: str
    reason: str


@dataclass(frozen=True)
class Result:
    """A task's number for a run."""

    task: str
    version: int
    """Raised whenever a change of the task changes its numbers."""
    value: float
    standard_error: float
    unit: str
    count: int
    """Items the value is the mean of."""
    details: dict[str, Any] = field(default_factory=dict)
    weights: RunWeights | None = None
    """Which it speaks of; a task leaves it out, `evals.run` knows. None in older files, too."""
