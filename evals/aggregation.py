"""What a task's samples say together: the values of its metrics, with their standard errors.

Every metric is a function of sums over samples. Each sample adds a few numbers (its moments), the
function knows no sample: so one rule gives standard errors, and a bootstrap draws sums alone. N
samples, M moments.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from evals.samples import Aggregation, Metric
from evals.scoring import Value


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


def aggregate(metric: Metric, draws: Sequence[Mapping[str, Value]]) -> Score:
    """The score of samples' values.

    Args:
      draws: by the samples' keys, for each draw of few-shot examples; with several, the value is
        the mean of the draws' and the standard error that of the samples' means.
    """
    each = [dict(zip(draw, moments(metric, list(draw.values())), strict=True)) for draw in draws]
    sums = np.array([np.sum(list(rows.values()), axis=0) for rows in each])
    values = tuple(values_of(metric, sums).tolist())
    common = [key for key in each[0] if all(key in rows for rows in each)]
    means_NM = np.array([np.mean([rows[key] for rows in each], axis=0) for key in common])
    error = standard_error(metric, means_NM)
    return Score(float(np.mean(values)), error, values if len(values) > 1 else ())


def moments(metric: Metric, values: Sequence[Value]) -> np.ndarray:
    """What each sample adds to the sums that a metric is made of, float64 [N, M].

    Of a mean its value and one; of a text its nats and bytes (or words); of a question of yes and
    no one, whether yes is right, whether it was told, and both.
    """
    array = np.array(values, float)
    match metric.aggregation:
        case "mean":
            return np.stack([array, np.ones_like(array)], axis=-1)
        case "bits_per_byte" | "weighted_perplexity":
            return array * np.array([-1.0, 1.0])
        case "f1" | "mcc":
            gold, told = array.T
            return np.stack([np.ones_like(gold), gold, told, gold * told], axis=-1)
        case _:
            assert_never(metric.aggregation)


def values_of(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """A metric of sums of moments, [...] of [..., M]; NaN where it is not defined."""
    with np.errstate(all="ignore"):
        return _FUNCTIONS[metric.aggregation][0](sums)


def standard_error(metric: Metric, moments_NM: np.ndarray) -> float | None:
    """Of a metric over independent samples; None of a single one, and where there is none.

    Linearised (the delta method; of a ratio Cochran 1977, section 6.4; of a mean the usual one): to
    first order a sample moves the metric by its moments times the slopes, which sum to 0.
    """
    count = len(moments_NM)
    with np.errstate(all="ignore"):
        slopes_M = _FUNCTIONS[metric.aggregation][1](moments_NM.sum(axis=0))
        moved_N = moments_NM @ slopes_M
        error = float(np.sqrt(np.divide(count, count - 1) * (moved_N**2).sum()))
    return error if math.isfinite(error) else None


# --- Metrics as functions of sums, and their slopes -----------------------------------------------


def _mean(sums: np.ndarray) -> np.ndarray:
    """Also nats per byte; 0 of nothing."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1.0)


def _mean_slopes(sums_M: np.ndarray) -> np.ndarray:
    return np.array([1.0, -_mean(sums_M)]) / sums_M[1]


def _bits(sums: np.ndarray) -> np.ndarray:
    return _mean(sums) / math.log(2)


def _bits_slopes(sums_M: np.ndarray) -> np.ndarray:
    return _mean_slopes(sums_M) / math.log(2)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(_mean(sums))


def _perplexity_slopes(sums_M: np.ndarray) -> np.ndarray:
    return _mean_slopes(sums_M) * _perplexity(sums_M)


def _f1(sums: np.ndarray) -> np.ndarray:
    """2 |both| / (|right| + |told|); 0 where yes is neither right nor told."""
    _, gold, told, both = np.moveaxis(sums, -1, 0)
    return 2 * both / np.maximum(gold + told, 1.0)


def _f1_slopes(sums_M: np.ndarray) -> np.ndarray:
    _, gold, told, _ = sums_M
    return np.array([0.0, -_f1(sums_M), -_f1(sums_M), 2.0]) / (gold + told)


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Correlation of what is right and what was told; 0 where one of them never changes."""
    count, gold, told, both = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(gold * (count - gold) * told * (count - told))
    return np.where(spread, (count * both - gold * told) / spread, 0.0)


def _matthews_slopes(sums_M: np.ndarray) -> np.ndarray:
    count, gold, told, both = sums_M
    spread = np.sqrt(gold * (count - gold) * told * (count - told))
    half = _matthews(sums_M) / 2
    return np.array(
        [
            both / spread - half * (1 / (count - gold) + 1 / (count - told)),
            -told / spread - half * (1 / gold - 1 / (count - gold)),
            -gold / spread - half * (1 / told - 1 / (count - told)),
            count / spread,
        ]
    )


_OfSums = Callable[[np.ndarray], np.ndarray]
_FUNCTIONS: Mapping[Aggregation, tuple[_OfSums, _OfSums]] = {
    "mean": (_mean, _mean_slopes),
    "bits_per_byte": (_bits, _bits_slopes),
    "weighted_perplexity": (_perplexity, _perplexity_slopes),
    "f1": (_f1, _f1_slopes),
    "mcc": (_matthews, _matthews_slopes),
}
