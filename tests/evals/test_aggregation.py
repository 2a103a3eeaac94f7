"""Metrics of all samples: definitions written out, and their errors beside resampled samples."""

import math

import numpy as np
import pytest

from evals.aggregation import aggregate, moments, standard_error
from evals.samples import Choices, Likelihood, Metric
from evals.scoring import ACC, BITS_PER_BYTE, BYTE_PERPLEXITY, F1, MATTHEWS, score_choices

RANDOM = np.random.RandomState(0)
GOLD = RANDOM.randint(0, 2, 60)
TOLD = np.where(RANDOM.rand(60) < 0.7, GOLD, 1 - GOLD)
SIZES = RANDOM.randint(100, 5000, 60).astype(float)
NATS = -SIZES * (0.2 + 0.03 * RANDOM.randn(60))
VALUES = {
    ACC: (GOLD == TOLD).astype(float).tolist(),
    BITS_PER_BYTE: list(zip(NATS, SIZES, strict=True)),
    BYTE_PERPLEXITY: list(zip(NATS, SIZES, strict=True)),
    F1: list(zip(GOLD.astype(float), TOLD.astype(float), strict=True)),
    MATTHEWS: list(zip(GOLD.astype(float), TOLD.astype(float), strict=True)),
}


def by_definition(metric: Metric, values) -> float:
    array = np.array(values)
    if metric == ACC:
        return float(array.mean())
    first, second = array.T
    if metric == BITS_PER_BYTE:
        return float(-first.sum() / second.sum() / np.log(2))
    if metric == BYTE_PERPLEXITY:
        return float(np.exp(-first.sum() / second.sum()))
    if metric == F1:
        precision = first[second == 1].mean()
        recall = second[first == 1].mean()
        return float(2 * precision * recall / (precision + recall))
    return float(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize("metric", VALUES, ids=lambda metric: metric.name)
def test_value_and_error_are_those_of_the_definition_and_of_resampled_samples(metric):
    values = VALUES[metric]
    found = aggregate(metric, [{str(i): x for i, x in enumerate(values)}])
    assert found.value == pytest.approx(by_definition(metric, values), rel=1e-12)
    random = np.random.RandomState(1)
    again = [
        by_definition(metric, [values[i] for i in random.randint(0, 60, 60)]) for _ in range(4000)
    ]
    assert found.standard_error == pytest.approx(np.std(again), rel=0.1)


@pytest.mark.parametrize("metric", [F1, MATTHEWS], ids=lambda metric: metric.name)
@pytest.mark.parametrize(("gold", "told"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_class_that_is_never_right_or_never_told_scores_nothing(metric, gold, told):
    found = aggregate(metric, [{"a": (gold, told), "b": (gold, told)}])
    assert found.value == 0.0
    assert found.standard_error is None or found.standard_error >= 0.0


def test_one_sample_has_no_error():
    for metric, values in VALUES.items():
        assert standard_error(metric, moments(metric, values[:1])) is None


def test_several_draws_give_the_mean_of_their_values():
    draws = [{"a": (1.0, 1.0), "b": (0.0, 1.0)}, {"a": (1.0, 1.0), "b": (0.0, 0.0)}]
    found = aggregate(F1, draws)
    assert found.draws == (pytest.approx(2 / 3), 1.0)
    assert found.value == pytest.approx(5 / 6)
    assert found.deviation == pytest.approx(math.sqrt(2) * (1 - 2 / 3) / 2)


def test_the_likelier_of_two_choices_is_what_the_model_told():
    sample = Choices("0", "x", (" no", " yes"), 0)
    likelihoods = [Likelihood(-2.0, True, 1), Likelihood(-1.0, True, 1)]
    assert score_choices(sample, likelihoods)[F1] == (0.0, 1.0)
    three = Choices("0", "x", ("a", "b", "c"), 0)
    assert F1 not in score_choices(three, [*likelihoods, likelihoods[0]])
