"""Scores of single samples; evals/aggregation.py has what they say together.

A choice is scored by the log-likelihood of its text given the context: acc takes the likeliest
choice, acc_norm the one likeliest per UTF-8 byte (lm-evaluation-harness has that as acc_bytes, its
own acc_norm counts characters: the same for English). Of texts, totals are divided by totals.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.samples import Answer, Choices, Likelihood, Metric, Rolling, Tokens
from infer.score import TokenScores

ACC, ACC_NORM = Metric("acc"), Metric("acc_norm")
BITS_PER_BYTE = Metric("bits_per_byte", higher_is_better=False, aggregation="bits_per_byte")
BYTE_PERPLEXITY, WORD_PERPLEXITY = (
    Metric(name, higher_is_better=False, aggregation="weighted_perplexity")
    for name in ("byte_perplexity", "word_perplexity")
)
EXACT_MATCH = Metric("exact_match")
F1, MATTHEWS = Metric("f1", aggregation="f1"), Metric("mcc", aggregation="mcc")
"""Of the second of two choices (yes), over all samples: GLUE's, by the likeliest choice."""

CHOICES = (ACC, ACC_NORM)
"""Metrics of multiple choice."""
ROLLING = (BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY)
"""Metrics of texts; word_perplexity where the text itself is known."""

Pair = tuple[float, float]
"""log p of a text, and what it is divided by (bytes or words); or of a question of yes and no the
right answer and the model's, 0 or 1."""
Value = float | Pair
"""Of one sample: a number whose mean counts, or a pair for a metric of all samples at once."""
Values = Mapping[Metric, Value]


def score_choices(sample: Choices, likelihoods: Sequence[Likelihood]) -> Values:
    """acc and acc_norm of one question, of two choices also what f1 and mcc are made of; of equally
    likely choices the first is taken."""
    nats = np.array([found.nats for found in likelihoods])
    sizes = np.array([max(len(choice.encode()), 1) for choice in sample.choices])
    best = int(nats.argmax())
    values: dict[Metric, Value] = {
        ACC: float(best == sample.answer),
        ACC_NORM: float(int((nats / sizes).argmax()) == sample.answer),
    }
    if len(sample.choices) == 2:
        values |= dict.fromkeys((F1, MATTHEWS), (float(sample.answer), float(best)))
    return values


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


def as_value(found: Any) -> Value:
    """A value as it came back from JSON, which writes null for what is no number."""
    if isinstance(found, list):
        return _number(found[0]), _number(found[1])
    return _number(found)


def _number(found: Any) -> float:
    return math.nan if found is None else float(found)
