"""Which of two models a question is for: a small one where its answer will do, else the large one.

A logistic regression on what the small model makes of the question (how surprising its tokens are,
how long it is) estimates the probability that the small model's answer is as good as the large
one's; questions above a threshold stay with the small one. The threshold is the lowest that keeps a
target share of the gap in quality on questions that were kept apart for that (RouteLLM, 2024;
FrugalGPT, 2023).

PGR, the performance gap recovered, is (q - q_small) / (q_large - q_small) of the mean scores.
Random routing recovers the share of calls that go to the large model.

N questions, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.checks import require
from infer.scored_questions import Question

FEATURES = ("mean", "deviation", "largest", "last", "as_expected", "log_length")
"""Of a question's tokens: nats on average, their deviation, the largest, the average of the last
LAST, the share that was the most likely one, and the logarithm of their number."""
LAST = 8
PENALTY = 1.0
"""Of the squared weights of scaled features, in questions."""
LEAST = 40
"""Questions, below which neither a fit nor its report means anything."""
FIT, CALIBRATED = 0.5, 0.25
"""Shares of the questions that weights are fitted to, and the threshold; the rest is held out."""


@dataclass(frozen=True)
class Report:
    """What a router does with questions that it has not seen."""

    questions: int
    call_share: float
    """Of questions that go to the large model."""
    quality: float
    small_quality: float
    large_quality: float
    pgr: float
    random_pgr: float
    """Of random routing with as many calls: the call share."""
    apgr: float
    """The mean PGR over all call shares; random routing has 0.5."""
    oracle_apgr: float
    """Of routing that knows both scores."""
    calibration_error: float
    """The mean distance of probabilities from what came of them, in ten bins."""


@dataclass(frozen=True)
class Router:
    """A logistic regression and its threshold."""

    small: str
    """The source of the small model, whose features these are."""
    weights: list[float]
    bias: float
    means: list[float]
    scales: list[float]
    threshold: float
    """From this probability on a question stays with the small model."""
    target: float
    report: Report

    def __post_init__(self) -> None:
        sizes = {len(self.weights), len(self.means), len(self.scales)}
        require(
            sizes == {len(FEATURES)} and min(self.scales) > 0,
            f"a router has a weight, a mean and a scale above 0 for each of {len(FEATURES)} "
            "features: make the file again with moesaic calibrate-router",
        )

    def probability(self, features_F: np.ndarray) -> float:
        """That the small model's answer will do."""
        return float(self.probabilities(features_F[None])[0])

    def probabilities(self, features_NF: np.ndarray) -> np.ndarray:
        scaled_NF = (features_NF - np.array(self.means)) / np.array(self.scales)
        return _sigmoid(scaled_NF @ np.array(self.weights) + self.bias)

    def is_small(self, features_F: np.ndarray) -> bool:
        return self.probability(features_F) >= self.threshold


def features_of(nats_L: np.ndarray, is_best_L: np.ndarray) -> np.ndarray:
    """A question's features [F].

    Args:
      nats_L: -log p of its tokens after the first, as the small model has them.
      is_best_L: bool, whether each was the most likely one.
    """
    nats = np.asarray(nats_L, np.float64)
    found = (
        *(nats.mean(), nats.std(), nats.max(), nats[-LAST:].mean()),
        *(np.mean(is_best_L), np.log(len(nats))),
    )
    return np.array(found)


def calibrate(
    questions: Sequence[Question],
    features_NF: np.ndarray,
    *,
    small: str,
    target: float = 0.95,
    seed: int = 0,
) -> Router:
    """Fits a router to a half of the questions, its threshold to a quarter, and judges it by the
    rest.

    Raises:
      UserError: too few questions, scores that are no numbers, or a small model that is as good.
    """
    require(0 < target <= 1, f"target {target} must lie above 0, and 1 at most")
    require(
        len(questions) >= LEAST,
        f"{len(questions)} scored questions are too few to learn from: give {LEAST} or more",
    )
    scores_N2 = np.array([(q.small, q.large) for q in questions], np.float64)
    gap = float(np.diff(scores_N2.mean(axis=0))[0])
    require(
        gap > 0,
        f"the small model scores {scores_N2[:, 0].mean():.3f} and the large one "
        f"{scores_N2[:, 1].mean():.3f}: there is no gap to recover, serve the small one",
    )
    order = np.random.default_rng(seed).permutation(len(questions))
    first, second = round(FIT * len(order)), round((FIT + CALIBRATED) * len(order))
    fitted, calibrated, held_out = np.split(order, [first, second])
    does_N = scores_N2[:, 0] >= scores_N2[:, 1]
    means, scales = features_NF[fitted].mean(axis=0), features_NF[fitted].std(axis=0)
    scales = np.where(scales > 1e-9, scales, 1.0)
    weights, bias = fit_logistic((features_NF[fitted] - means) / scales, does_N[fitted])
    probability_N = _sigmoid((features_NF - means) / scales @ weights + bias)
    threshold = choose_threshold(probability_N[calibrated], scores_N2[calibrated], target)
    return Router(
        small=small,
        weights=weights.tolist(),
        bias=float(bias),
        means=means.tolist(),
        scales=scales.tolist(),
        threshold=threshold,
        target=target,
        report=judge(probability_N[held_out], scores_N2[held_out], threshold),
    )


def fit_logistic(x_NF: np.ndarray, does_N: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [F] and bias of least cross-entropy plus PENALTY / 2 times the squared weights, by
    Newton's method."""
    x_NG = np.concatenate([x_NF, np.ones((len(x_NF), 1))], axis=1)
    penalty_G = np.array([PENALTY] * x_NF.shape[1] + [1e-6])
    w_G, y_N = np.zeros(x_NG.shape[1]), does_N.astype(np.float64)
    for _ in range(100):
        p_N = _sigmoid(x_NG @ w_G)
        gradient_G = x_NG.T @ (p_N - y_N) + penalty_G * w_G
        curvature_GG = (x_NG.T * (p_N * (1 - p_N))) @ x_NG + np.diag(penalty_G)
        step_G = np.linalg.solve(curvature_GG, gradient_G)
        w_G -= step_G * min(1.0, 4.0 / max(np.abs(step_G).max(), 1e-12))
        if np.abs(step_G).max() < 1e-10:
            break
    return w_G[:-1], float(w_G[-1])


def choose_threshold(probability_N: np.ndarray, scores_N2: np.ndarray, target: float) -> float:
    """The lowest threshold that keeps the target share of the gap; above 1 where none does but to
    send everything to the large model."""
    chosen = 2.0
    for threshold in np.unique(probability_N)[::-1]:
        if pgr_of(probability_N >= threshold, scores_N2) >= target:
            chosen = float(threshold)
    return chosen


def pgr_of(is_small_N: np.ndarray, scores_N2: np.ndarray) -> float:
    """The share of the gap that a routing recovers; 1 where these questions have no gap and nothing
    is lost, 0 where something is."""
    small, large = scores_N2.mean(axis=0)
    quality = np.where(is_small_N, scores_N2[:, 0], scores_N2[:, 1]).mean()
    if large <= small:
        return 1.0 if quality >= large else 0.0
    return float((quality - small) / (large - small))


def judge(probability_N: np.ndarray, scores_N2: np.ndarray, threshold: float) -> Report:
    """What routing by these probabilities comes to."""
    is_small_N = probability_N >= threshold
    quality = np.where(is_small_N, scores_N2[:, 0], scores_N2[:, 1]).mean()
    does_N = scores_N2[:, 0] >= scores_N2[:, 1]
    share = float(1 - is_small_N.mean())
    return Report(
        questions=len(probability_N),
        call_share=share,
        quality=float(quality),
        small_quality=float(scores_N2[:, 0].mean()),
        large_quality=float(scores_N2[:, 1].mean()),
        pgr=pgr_of(is_small_N, scores_N2),
        random_pgr=share,
        apgr=mean_pgr(-probability_N, scores_N2),
        oracle_apgr=mean_pgr(scores_N2[:, 1] - scores_N2[:, 0], scores_N2),
        calibration_error=calibration_error(probability_N, does_N),
    )


def mean_pgr(need_N: np.ndarray, scores_N2: np.ndarray) -> float:
    """The mean PGR over all call shares, those with most need going to the large model first; of
    equal needs the mean over their orders."""
    gaps_N = scores_N2[:, 1] - scores_N2[:, 0]
    if gaps_N.sum() <= 0:
        return 1.0
    _, place_N = np.unique(-need_N, return_inverse=True)
    sums, counts = np.bincount(place_N, weights=gaps_N), np.bincount(place_N)
    ordered_N = np.repeat(sums / counts, counts)
    recovered = np.concatenate([[0.0], np.cumsum(ordered_N) / gaps_N.sum()])
    return float(((recovered[1:] + recovered[:-1]) / 2).mean())


def calibration_error(probability_N: np.ndarray, does_N: np.ndarray, bins: int = 10) -> float:
    """The mean over questions of how far their bin's mean probability is from its mean outcome."""
    bin_N = np.minimum((probability_N * bins).astype(int), bins - 1)
    distances = [
        abs(probability_N[bin_N == b].sum() - does_N[bin_N == b].sum()) for b in np.unique(bin_N)
    ]
    return float(sum(distances) / len(probability_N))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def report_of(router: Router) -> str:
    """What the router does with the questions that were held out."""
    r = router.report
    return (
        f"{r.questions} questions held out: {r.call_share:.1%} go to the large model, score "
        f"{r.quality:.3f} (small alone {r.small_quality:.3f}, large alone {r.large_quality:.3f})\n"
        f"performance gap recovered {r.pgr:.1%}, at random {r.random_pgr:.1%}; over all shares "
        f"{r.apgr:.3f} of at most {r.oracle_apgr:.3f}, at random 0.5; probabilities are off by "
        f"{r.calibration_error:.3f}"
    )
