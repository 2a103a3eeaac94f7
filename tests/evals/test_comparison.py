"""Paired comparison: closed forms, and how often intervals and p-values hold in a simulation."""

import json
import math
from itertools import product

import numpy as np
import pytest

from evals.comparison import compare_records, mcnemar, paired, write_comparison
from evals.page import draw_differences, write_comparison_page
from evals.run import evaluate_task
from evals.scoring import ACC, BITS_PER_BYTE
from tests.evals import tiny_results
from tests.evals.planted import Planted, evaluation


def test_mcnemar_is_the_exact_binomial_test():
    """By going through all outcomes of fair coins: as unequal as this, or more."""
    for first, second in product(range(5), range(5)):
        count = first + second
        least = abs(first - second)
        as_unequal = sum(
            abs(sum(coins) - (count - sum(coins))) >= least
            for coins in product((0, 1), repeat=count)
        )
        assert mcnemar(first, second) == pytest.approx(as_unequal / 2**count)
    assert mcnemar(0, 20) == pytest.approx(2 / 2**20)


def pairs_of(counts: dict[tuple[float, float], int]) -> list[tuple[float, float]]:
    return [pair for pair, count in counts.items() for _ in range(count)]


def test_a_difference_of_shares():
    pairs = pairs_of({(1.0, 1.0): 50, (1.0, 0.0): 30, (0.0, 1.0): 10, (0.0, 0.0): 10})
    found = paired("task", ACC, pairs)
    assert (found.value, found.against, found.count) == (0.8, 0.6, 100)
    assert found.difference == pytest.approx(0.2)
    assert (found.only_first, found.only_second) == (30, 10)
    assert found.p_value == mcnemar(30, 10)
    # The normal approximation of the paired difference: sqrt((b + c - (b - c)^2 / n)) / n.
    error = math.sqrt(40 - 20**2 / 100) / 100
    assert found.low == pytest.approx(0.2 - 1.96 * error, abs=0.012)
    assert found.high == pytest.approx(0.2 + 1.96 * error, abs=0.012)
    assert found.is_clear
    alike = paired("task", ACC, [(1.0, 1.0), (0.0, 0.0)])
    assert (alike.difference, alike.low, alike.high, alike.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_of_bits_per_byte_is_of_totals():
    random = np.random.default_rng(0)
    sizes = random.integers(50, 500, 40).astype(float)
    ours, theirs = (-sizes * random.normal(m, 0.1, 40) for m in (1.5, 1.6))
    pairs = [((a, n), (b, n)) for a, b, n in zip(ours, theirs, sizes, strict=True)]
    found = paired("task", BITS_PER_BYTE, pairs)
    bits = [-x.sum() / sizes.sum() / math.log(2) for x in (ours, theirs)]
    assert found.difference == pytest.approx(bits[0] - bits[1])
    residuals = (theirs - ours) / math.log(2) - found.difference * sizes
    error = np.sqrt((residuals**2).sum() * 40 / 39) / sizes.sum()
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.p_value is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Models that are right in 60 % and 50 %, of samples whose difficulty they share."""
    random, inside, below = np.random.default_rng(1), 0, 0
    for _ in range(200):
        easy = random.random(150) < 0.5
        ours = (random.random(150) < np.where(easy, 0.9, 0.3)).astype(float)
        theirs = (random.random(150) < np.where(easy, 0.8, 0.2)).astype(float)
        found = paired("task", ACC, list(zip(ours.tolist(), theirs.tolist(), strict=True)))
        inside += found.low <= 0.1 <= found.high
        below += found.p_value < 0.05
    assert 0.90 <= inside / 200 <= 0.99
    assert 0.3 < below / 200 < 0.8  # the power of this many samples; the level would be 0.05


def test_two_evaluations_side_by_side(tmp_path):
    task, samples = tiny_results.TASK, tiny_results.SAMPLES
    right = {(s.context, s.choices[s.answer]) for s in samples}
    knows = Planted(lambda context, choice: 0.0 if (context, choice) in right else -9.0)
    likes_one = Planted(lambda context, choice: -1.0 if choice == " one" else -2.0)
    ours = evaluate_task(evaluation(knows, tmp_path / "a"), task)
    theirs = evaluate_task(evaluation(likes_one, tmp_path / "b", weights="b"), task)
    differences = write_comparison(tmp_path, "ours", "theirs", [ours], [theirs])
    tree = json.loads((tmp_path / "comparison.json").read_text())
    first = tree["differences"][0]
    assert (first["task"], first["metric"], first["difference"]) == ("numbers", "acc", 0.5)
    assert (first["only_first_right"], first["only_second_right"]) == (2, 0)
    page = write_comparison_page(tmp_path, "ours <i>", "theirs", differences).read_text()
    assert "ours &lt;i&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert draw_differences("a", "b", differences).png.startswith(b"\x89PNG")


def test_only_samples_that_both_have_unchanged_count(tmp_path):
    task, like = tiny_results.TASK, Planted()
    ours = evaluate_task(evaluation(like, tmp_path / "a"), task)
    theirs = evaluate_task(evaluation(like, tmp_path / "b", limit=3), task)
    found = compare_records(task, ours.records, theirs.records)
    assert [d.count for d in found] == [3, 3]
    assert compare_records(task, ours.records[:1], theirs.records[1:]) == []
