"""Routing questions between two models: arithmetic of planted scores, limits, calibration."""

import dataclasses

import numpy as np
import pytest

from configs.checks import UserError
from infer.query_router import (
    FEATURES,
    PENALTY,
    calibrate,
    choose_threshold,
    features_of,
    fit_logistic,
    judge,
    mean_pgr,
    pgr_of,
)
from infer.scored_questions import Question, question_of


def planted(count: int, seed: int = 0, noise: float = 0.0):
    """Questions whose first feature says how hard they are: the small model is right below 0.6 of
    it, the large one always."""
    rng = np.random.default_rng(seed)
    features_NF = rng.normal(size=(count, len(FEATURES)))
    hardness = features_NF[:, 0] + noise * rng.normal(size=count)
    easy = hardness < 0.25
    return [Question(f"q{i}", float(e), 1.0) for i, e in enumerate(easy)], features_NF


def test_a_gap_is_recovered_as_arithmetic_has_it():
    """Of four questions the small model gets one, the large one all; one is sent to each."""
    scores = np.array([[1, 1], [0, 1], [0, 1], [0, 1]], float)
    everything, nothing = np.zeros(4, bool), np.ones(4, bool)
    assert pgr_of(everything, scores) == 1.0
    assert pgr_of(nothing, scores) == 0.0
    assert pgr_of(np.array([True, True, False, False]), scores) == pytest.approx(2 / 3)
    # Where the small model is better now and then, more than the gap can be had.
    assert pgr_of(np.array([True, False]), np.array([[1.0, 0.0], [0.0, 1.5]])) == 3.0


def test_random_routing_recovers_its_share_of_calls():
    rng = np.random.default_rng(0)
    scores = rng.random((50, 2)) + np.array([0, 0.5])
    for share in (0.2, 0.7):
        found = [pgr_of(rng.random(50) >= share, scores) for _ in range(4000)]
        assert np.mean(found) == pytest.approx(share, abs=0.02)
    assert mean_pgr(np.zeros(50), scores) == pytest.approx(0.5)


def test_the_oracle_has_the_area_that_is_counted_by_hand():
    """Of 10 questions 4 need the large model: the gap is recovered along a line up to a share of
    0.4, then whole: 0.4 / 2 + 0.6. The worst order recovers only at the end: 0.2."""
    scores = np.array([[0, 1]] * 4 + [[1, 1]] * 6, float)
    gaps = scores[:, 1] - scores[:, 0]
    assert mean_pgr(gaps, scores) == pytest.approx(0.8)
    assert mean_pgr(-gaps, scores) == pytest.approx(0.2)


def test_a_router_finds_what_was_planted():
    questions, features = planted(2000)
    router = calibrate(questions, features, small="tiny", target=0.95)
    report, hard = router.report, np.mean([q.small < q.large for q in questions])
    assert report.pgr == pytest.approx(0.95, abs=0.06)
    assert report.call_share == pytest.approx(0.95 * hard, abs=0.04)
    assert report.pgr > report.random_pgr + 0.4
    assert report.apgr == pytest.approx(report.oracle_apgr, abs=0.02)
    assert report.questions == 500
    assert np.abs(router.weights[1:]).max() < 0.2 * -router.weights[0]


def test_a_router_without_a_clue_is_no_better_than_random():
    questions, features = planted(2000)
    rng = np.random.default_rng(5)
    report = calibrate(questions, rng.permutation(features), small="tiny", target=0.8).report
    assert report.apgr == pytest.approx(0.5, abs=0.05)
    assert report.pgr == pytest.approx(report.random_pgr, abs=0.12)
    assert report.calibration_error < 0.08


def test_probabilities_mean_what_they_say():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(4000, len(FEATURES)))
    chance = 1 / (1 + np.exp(-1.5 * features[:, 0]))
    small = (rng.random(4000) < chance).astype(float)
    questions = [Question("q", s, 1.0) for s in small]
    router = calibrate(questions, features, small="tiny")
    assert router.report.calibration_error < 0.05
    assert router.weights[0] / router.scales[0] == pytest.approx(1.5, abs=0.15)


def test_the_threshold_is_the_lowest_that_keeps_the_target():
    rng = np.random.default_rng(2)
    probability, scores = rng.random(60), np.stack([rng.random(60), rng.random(60) + 0.5], 1)
    for target in (0.3, 0.8, 0.99):
        chosen = choose_threshold(probability, scores, target)
        good = [t for t in probability if pgr_of(probability >= t, scores) >= target]
        assert chosen == min(good, default=2.0)
    limits = [judge(probability, scores, t) for t in (0.0, 2.0)]
    assert [x.call_share for x in limits] == [0.0, 1.0]
    assert [x.pgr for x in limits] == pytest.approx([0.0, 1.0])


def test_the_fit_is_where_the_gradient_vanishes():
    """By finite differences of the loss, written out."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(80, 3)), rng.random(80) < 0.4

    def loss(w):
        z = x @ w[:3] + w[3]
        return np.sum(np.log1p(np.exp(z)) - y * z) + PENALTY / 2 * np.sum(w[:3] ** 2)

    weights, bias = fit_logistic(x, y)
    at = np.array([*weights, bias])
    for i in range(4):
        step = 1e-5 * np.eye(4)[i]
        assert (loss(at + step) - loss(at - step)) / 2e-5 == pytest.approx(0, abs=1e-4)
    separated = fit_logistic(np.array([[-1.0], [1.0]] * 20), np.array([False, True] * 20))
    assert np.isfinite(separated[0]).all()


def test_features_are_of_the_tokens():
    nats = np.arange(1.0, 11.0)
    found = features_of(nats, nats > 7)
    assert found.tolist() == pytest.approx(
        [5.5, nats.std(), 10.0, nats[-8:].mean(), 0.3, np.log(10)]
    )


@pytest.mark.parametrize(
    ("count", "changes", "target", "sentence"),
    [
        (39, {}, 0.95, "39 scored questions are too few"),
        (80, {"large": 0.0}, 0.95, "there is no gap to recover"),
        (80, {}, 1.5, "target 1.5 must lie above 0"),
    ],
)
def test_what_can_not_be_calibrated_is_refused(count, changes, target, sentence):
    questions, features = planted(count)
    questions = [dataclasses.replace(q, **changes) for q in questions]
    with pytest.raises(UserError, match=sentence):
        calibrate(questions, features, small="tiny", target=target)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {"prompt": "x", "small": 1},
        {"prompt": " ", "small": 1, "large": 0},
        {"prompt": "x", "small": "1", "large": 0},
        {"prompt": "x", "small": float("nan"), "large": 0},
    ],
)
def test_lines_that_are_no_questions_are_refused(tree):
    with pytest.raises(UserError, match="line 3"):
        question_of(tree, "line 3")
