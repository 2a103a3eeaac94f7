"""Scores of samples, and what a task's samples say together: values with their standard errors.

A choice is scored by the log-likelihood of its text given the context: acc takes the likeliest
choice, acc_norm the one likeliest per UTF-8 byte (lm-evaluation-harness has that as acc_bytes, its
own acc_norm counts characters: the same for English). Of texts, totals are divided by totals.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.samples import Answer, Choices, Likelihood, Metric, Rolling, Tokens
from infer.score import TokenScores

ACC, ACC_NORM = Metric("acc"), Metric("acc_norm")
BITS_PER_BYTE = Metric("bits_per_byte", higher_is_better=False)
BYTE_PERPLEXITY = Metric("byte_perplexity", higher_is_better=False)
WORD_PERPLEXITY = Metric("word_perplexity", higher_is_better=False)
EXACT_MATCH = Metric("exact_match")

CHOICES = (ACC, ACC_NORM)
"""Metrics of multiple choice."""
ROLLING = (BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY)
"""Metrics of texts; word_perplexity where the text itself is known."""

Ratio = tuple[float, float]
"""log p of a text, and what it is divided by: bytes or words."""
Value = float | Ratio
"""Of one sample: a number whose mean counts, or a ratio's numerator and denominator."""
Values = Mapping[Metric, Value]


@dataclass(frozen=True)
class Score:
    """A metric of a task or of one of its groups."""

    value: float
    standard_error: float | None
    """Over samples; None of a single one."""
    draws: tuple[float, ...] = ()
    """The value of each draw of few-shot examples, where there are several."""

    @property
    def deviation(self) -> float | None:
        """Standard deviation over draws; None without several."""
        return float(np.std(self.draws, ddof=1)) if len(self.draws) > 1 else None


def score_choices(sample: Choices, likelihoods: Sequence[Likelihood]) -> Values:
    """acc and acc_norm of one question; of equally likely choices the first is taken."""
    nats = np.array([found.nats for found in likelihoods])
    sizes = np.array([max(len(choice.encode()), 1) for choice in sample.choices])
    return {
        ACC: float(int(nats.argmax()) == sample.answer),
        ACC_NORM: float(int((nats / sizes).argmax()) == sample.answer),
    }


def score_text(text: str, found: Rolling) -> Values:
    """Log-likelihood with bytes and words of a text."""
    per_byte = (found.nats, float(found.num_bytes))
    words = float(len(re.split(r"\s+", text)))
    return {
        BITS_PER_BYTE: per_byte,
        BYTE_PERPLEXITY: per_byte,
        WORD_PERPLEXITY: (found.nats, words),
    }


def score_tokens(sample: Tokens, scores: TokenScores) -> Values:
    """Of a text in the model's own tokens: exact_match of its answer, or bits per byte."""
    if not sample.num_answer:
        per_byte = (0.0 - float(scores.nats.sum(dtype=np.float64)), float(sample.num_bytes))
        return {BITS_PER_BYTE: per_byte, BYTE_PERPLEXITY: per_byte}
    answer, best = sample.tokens[-sample.num_answer :], scores.best_ids[-sample.num_answer :]
    last_ids = sample.last_ids or (int(answer[-1]),)
    is_exact = bool((best[:-1] == answer[:-1]).all()) and int(best[-1]) in last_ids
    return {EXACT_MATCH: float(is_exact)}


def is_empty(answer: Answer) -> bool:
    """Whether an answer has no text, or blanks alone."""
    return not answer.text.strip()


# --- Over samples ---------------------------------------------------------------------------------


def aggregate(metric: Metric, draws: Sequence[Mapping[str, Value]]) -> Score:
    """The score of samples' values.

    Args:
      draws: by the samples' keys, for each draw of few-shot examples; with several, the value is
        the mean of the draws' and the standard error that of the samples' means.
    """
    each = tuple(_value(metric, list(draw.values())) for draw in draws)
    if len(draws) == 1:
        return Score(each[0], _standard_error(metric, list(draws[0].values())))
    common = [key for key in draws[0] if all(key in draw for draw in draws)]
    means: list[Value] = []
    for key in common:
        mean = np.mean([np.asarray(draw[key]) for draw in draws], axis=0)
        means.append((float(mean[0]), float(mean[1])) if mean.ndim else float(mean))
    return Score(float(np.mean(each)), _standard_error(metric, means), each)


def _value(metric: Metric, values: Sequence[Value]) -> float:
    if metric not in ROLLING:
        return float(np.mean(np.array(values, float)))
    nats, sizes = np.array(values, float).T
    return _of_mean(metric)[0](float(-nats.sum() / max(sizes.sum(), 1.0)))


def _standard_error(metric: Metric, values: Sequence[Value]) -> float | None:
    if len(values) < 2:
        return None
    if metric not in ROLLING:
        return mean_standard_error(np.array(values, float))
    nats, sizes = np.array(values, float).T
    if not sizes.sum():
        return None
    slope = _of_mean(metric)[1](float(-nats.sum() / sizes.sum()))
    return slope * ratio_standard_error(-nats, sizes)


def _of_mean(metric: Metric) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """A metric as a function of the nats per byte or word, and that function's slope."""
    if metric == BITS_PER_BYTE:
        return (lambda nats: nats / math.log(2)), (lambda _: 1 / math.log(2))
    return _exp, _exp


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def mean_standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values, from their sample standard deviation."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def ratio_standard_error(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent texts.

    The linearised variance of a ratio estimator (Cochran 1977, section 6.4); 0 for a single text.
    """
    count = len(numerators)
    if count < 2:
        return 0.0
    ratio = numerators.sum() / denominators.sum()
    residuals = numerators - ratio * denominators
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / denominators.sum())


def rate(flags: Sequence[bool]) -> float:
    """Share of what is true; 0 of none."""
    return float(np.mean(flags)) if len(flags) else 0.0


def as_value(found: Any) -> Value:
    """A value as it came back from JSON, which writes null for what is no number."""
    if isinstance(found, list):
        return _number(found[0]), _number(found[1])
    return _number(found)


def _number(found: Any) -> float:
    return math.nan if found is None else float(found)
