"""Learn-then-Test (Angelopoulos et al. 2021): the loosest setting whose risk is certified.

Units of a calibration set (windows of text) are exchangeable with what will come, and each has a
risk in [0, 1] under each setting. Settings are tested from strict to loose, each against "its true
risk exceeds delta", and testing stops at the first that is not rejected. Then

    P(the risk of the chosen setting > delta) <= epsilon

over the draw of the calibration set, whatever the risks' distribution: fixed-sequence testing needs
no correction. Taking the loosest setting whose average looks small enough has no such guarantee.

Risks may come one setting at a time, so that those past the first failure are never computed.
Statistics in plain numpy. T settings, N units, L length.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np

from configs.checks import require
from infer.early_exit import exit_hidden
from infer.score import nats_and_best
from model.transformer import Transformer, Variables, output_weights
from model.unstacked import unstack

Bound = Literal["hoeffding", "hoeffding_bentkus", "betting"]


@dataclass(frozen=True)
class Certificate:
    threshold: float | None
    """The loosest certified one; None where not even the strictest is: use the full model."""
    p_values: list[float]
    """Of the settings tested, strict to loose; the last one may have failed."""
    risks: list[float]
    """Of the settings tested: the mean over the calibration units."""


def certify(
    risks_TN: Iterable[np.ndarray],
    thresholds: Sequence[float],
    *,
    delta: float,
    epsilon: float,
    bound: Bound = "betting",
) -> Certificate:
    """The loosest threshold certified to have risk <= delta, wrongly so with chance <= epsilon.

    Args:
      risks_TN: in [0, 1], of each threshold on each calibration unit, in random order; read up to
        the first threshold that fails.
      thresholds: strict to loose, that is falling; fixed before the risks were seen.
    Raises:
      UserError: arguments that void the guarantee.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        require(0 < value < 1, f"{name}={value} must lie between 0 and 1")
    require(
        all(a > b for a, b in itertools.pairwise(thresholds)),
        f"thresholds must fall, strict to loose, got {list(thresholds)}",
    )
    best, p_values, means = None, [], []
    rows = iter(risks_TN)
    for threshold in thresholds:
        risks_N = _checked(next(rows, None), threshold)
        p_values.append(BOUNDS[bound](risks_N, delta))
        means.append(float(risks_N.mean()))
        if p_values[-1] > epsilon:
            break
        best = float(threshold)
    return Certificate(best, p_values, means)


def _checked(risks_N: np.ndarray | None, threshold: float) -> np.ndarray:
    require(
        risks_N is not None and risks_N.ndim == 1 and risks_N.size > 0,
        f"risks of threshold {threshold} have shape {getattr(risks_N, 'shape', None)}, needed "
        "[units]",
    )
    assert risks_N is not None
    require(
        bool(np.all((risks_N >= 0) & (risks_N <= 1))),
        f"risks must lie in [0, 1], got {risks_N.min()} to {risks_N.max()}: clip them",
    )
    return risks_N


def hoeffding(risks_N: np.ndarray, delta: float) -> float:
    """exp(-2 n (delta - R)^2) for a mean of R < delta, else 1 (Hoeffding 1963)."""
    return math.exp(-2 * len(risks_N) * max(delta - float(risks_N.mean()), 0.0) ** 2)


def hoeffding_bentkus(risks_N: np.ndarray, delta: float) -> float:
    """min(exp(-n h1(min(R, delta), delta)), e P(Bin(n, delta) <= ceil(n R))) (Bates et al. 2021).

    h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)); never above `hoeffding`.
    """
    risk, num_units = float(risks_N.mean()), len(risks_N)
    a = min(risk, delta)
    h1 = (a * math.log(a / delta) if a > 0 else 0.0) + (1 - a) * math.log((1 - a) / (1 - delta))
    successes = math.ceil(num_units * risk - 1e-9)  # a mean of integers comes back inexact
    bentkus = math.e * binomial_cdf(successes, num_units, delta)
    return min(math.exp(-num_units * h1), bentkus, 1.0)


def betting(risks_N: np.ndarray, delta: float) -> float:
    """1 / max_i K_i, K_i = prod_{j <= i} (1 - l_j (X_j - delta)) (Waudby-Smith and Ramdas 2023).

    A gambler's capital K, who bets l_j in [0, 0.9 / (1 - delta)] on unit j's risk being below
    delta, is a non-negative supermartingale where it is not, so it reaches 1 / p with chance p at
    most (Ville). The bet is the best one for the mean and variance of the units before: small and
    even risks need far fewer units than the bounds that know their mean only.
    """
    units = np.arange(len(risks_N))
    before = lambda x: np.concatenate([[0.0], np.cumsum(x)[:-1]])  # noqa: E731
    mean_N = (delta + before(risks_N)) / (units + 1)
    variance_N = (delta * (1 - delta) + before((risks_N - mean_N) ** 2)) / (units + 1)
    edge_N = np.maximum(delta - mean_N, 0.0)
    bet_N = np.minimum(edge_N / (variance_N + edge_N**2), 0.9 / (1 - delta))
    log_capital_N = np.cumsum(np.log1p(-bet_N * (risks_N - delta)))
    return math.exp(-max(float(log_capital_N.max()), 0.0))


def binomial_cdf(successes: int, trials: int, chance: float) -> float:
    """P(Bin(trials, chance) <= successes)."""
    log_chance, log_rest = math.log(chance), math.log1p(-chance)
    all_ways = math.lgamma(trials + 1)
    terms = (
        all_ways
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_chance
        + (trials - k) * log_rest
        for k in range(min(successes, trials) + 1)
    )
    return min(math.fsum(map(math.exp, terms)), 1.0)


BOUNDS: dict[Bound, Callable[[np.ndarray, float], float]] = {
    "hoeffding": hoeffding,
    "hoeffding_bentkus": hoeffding_bentkus,
    "betting": betting,
}


def exit_risks(
    model: Transformer,
    variables: Variables,
    windows_NL: np.ndarray,
    thresholds: Sequence[float],
    *,
    batch_size: int = 8,
) -> Iterator[np.ndarray]:
    """What each exit threshold costs on each window, float64 [N] in [0, 1], one after the other.

    The cost is the relative increase of the window's mean cross-entropy over the full model's,
    clipped: a window that gets better counts as 0.

    Args:
      windows_NL: int32 tokens, each window a document of its own; its last token is a target only.
    """
    model, variables = unstack(model, variables)
    read = partial(window_losses, model, variables, windows_NL, batch_size=batch_size)
    whole_N = read(FULL_MODEL)
    for threshold in thresholds:
        yield np.clip((read(threshold) - whole_N) / np.maximum(whole_N, 1e-9), 0.0, 1.0)


def window_losses(
    model: Transformer,
    variables: Variables,
    windows_NL: np.ndarray,
    threshold: float,
    *,
    batch_size: int = 8,
) -> np.ndarray:
    """Mean cross-entropy of each window's tokens after its first, nats, float64 [N].

    Args:
      threshold: of the exits; FULL_MODEL takes none.
    """
    model, variables = unstack(model, variables)
    windows_NL = np.asarray(windows_NL, np.int32)
    batches = np.split(windows_NL, range(batch_size, len(windows_NL), batch_size))
    losses = [np.asarray(_window_nats(model, variables, b, threshold)) for b in batches]
    return np.concatenate(losses).astype(np.float64)


FULL_MODEL = 2.0
"""A threshold that no confidence reaches."""


@partial(jax.jit, static_argnums=0)
def _window_nats(model, variables, windows_BL, threshold):
    """Mean cross-entropy of each window, [B]."""
    tokens_BL, targets_BL = windows_BL[:, :-1], windows_BL[:, 1:]
    positions_BL = jax.lax.broadcasted_iota("int32", tokens_BL.shape, 1)
    hidden_BLD, _ = exit_hidden(model, variables, tokens_BL, positions_BL, threshold)
    nats_BL, _ = nats_and_best(
        hidden_BLD, output_weights(model, variables, as_stored=True), targets_BL
    )
    return nats_BL.mean(axis=1)
