"""Learn-then-Test (Angelopoulos et al. 2021): the loosest setting whose risk is certified.

Units of a calibration set (windows of text) are exchangeable with what will come, and each has a
risk in [0, 1] under each setting. Settings are tested from strict to loose, each against "its true
risk exceeds delta", and testing stops at the first that is not rejected. Then

    P(the risk of the chosen setting > delta) <= epsilon

over the draw of the calibration set, whatever the risks' distribution: fixed-sequence testing needs
no correction. Taking the loosest setting whose average looks small enough has no such guarantee.

Statistics in plain numpy. T settings, N units, L length.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np

from configs.checks import require
from infer.early_exit import exit_hidden
from infer.score import nats_and_best
from model.transformer import Transformer, Variables, output_weights

Bound = Literal["hoeffding", "hoeffding_bentkus"]


@dataclass(frozen=True)
class Certificate:
    threshold: float | None
    """The loosest certified one; None where not even the strictest is: use the full model."""
    p_values: list[float]
    """Of the settings tested, strict to loose; the last one may have failed."""
    risk: float | None
    """Mean over the calibration units at the threshold."""


def certify(
    risks_TN: np.ndarray,
    thresholds: Sequence[float],
    *,
    delta: float,
    epsilon: float,
    bound: Bound = "hoeffding_bentkus",
) -> Certificate:
    """The loosest threshold certified to have risk <= delta, wrongly so with chance <= epsilon.

    Args:
      risks_TN: in [0, 1], of each threshold on each calibration unit.
      thresholds: strict to loose, that is falling; fixed before the risks were seen.
    Raises:
      UserError: arguments that void the guarantee.
    """
    _check(risks_TN, thresholds, delta, epsilon)
    p_value: Callable[[float, int, float], float] = BOUNDS[bound]
    best, p_values = None, []
    for t, risks_N in enumerate(risks_TN):
        p_values.append(p_value(float(risks_N.mean()), len(risks_N), delta))
        if p_values[-1] > epsilon:
            break
        best = t
    if best is None:
        return Certificate(None, p_values, None)
    return Certificate(float(thresholds[best]), p_values, float(risks_TN[best].mean()))


def _check(risks_TN: np.ndarray, thresholds: Sequence[float], delta: float, epsilon: float) -> None:
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        require(0 < value < 1, f"{name}={value} must lie between 0 and 1")
    require(
        risks_TN.ndim == 2 and len(risks_TN) == len(thresholds) and risks_TN.size > 0,
        f"risks have shape {risks_TN.shape}, needed [{len(thresholds)} thresholds, units]",
    )
    require(
        bool(np.all((risks_TN >= 0) & (risks_TN <= 1))),
        f"risks must lie in [0, 1], got {risks_TN.min()} to {risks_TN.max()}: clip them",
    )
    require(
        all(a > b for a, b in itertools.pairwise(thresholds)),
        f"thresholds must fall, strict to loose, got {list(thresholds)}",
    )


def hoeffding(risk: float, num_units: int, delta: float) -> float:
    """exp(-2 n (delta - R)^2) for R < delta, else 1 (Hoeffding 1963)."""
    return math.exp(-2 * num_units * max(delta - risk, 0.0) ** 2)


def hoeffding_bentkus(risk: float, num_units: int, delta: float) -> float:
    """min(exp(-n h1(min(R, delta), delta)), e P(Bin(n, delta) <= ceil(n R))) (Bates et al. 2021).

    h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)); never above `hoeffding`.
    """
    a = min(risk, delta)
    h1 = (a * math.log(a / delta) if a > 0 else 0.0) + (1 - a) * math.log((1 - a) / (1 - delta))
    successes = math.ceil(num_units * risk - 1e-9)  # a mean of integers comes back inexact
    bentkus = math.e * binomial_cdf(successes, num_units, delta)
    return min(math.exp(-num_units * h1), bentkus, 1.0)


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


BOUNDS = {"hoeffding": hoeffding, "hoeffding_bentkus": hoeffding_bentkus}


def exit_risks(
    model: Transformer,
    variables: Variables,
    windows_NL: np.ndarray,
    thresholds: Sequence[float],
    *,
    batch_size: int = 8,
) -> np.ndarray:
    """What each exit threshold costs on each window, float64 [T, N] in [0, 1].

    The cost is the relative increase of the window's mean cross-entropy over the full model's,
    clipped: a window that gets better counts as 0.

    Args:
      windows_NL: int32 tokens, each window a document of its own; its last token is a target only.
    """
    windows_NL = np.asarray(windows_NL, np.int32)
    whole_N, *losses_TN = (
        window_losses(model, variables, windows_NL, threshold, batch_size=batch_size)
        for threshold in (FULL_MODEL, *thresholds)
    )
    return np.clip((np.stack(losses_TN) - whole_N) / np.maximum(whole_N, 1e-9), 0.0, 1.0)


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
    nats_BL, _ = nats_and_best(hidden_BLD, output_weights(model, variables), targets_BL)
    return nats_BL.mean(axis=1)
