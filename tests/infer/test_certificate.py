"""Learn-then-Test: its bounds against exact sums, its promise by Monte Carlo."""

import math

import jax
import numpy as np
import pytest

from configs.checks import UserError
from infer.certificate import (
    betting,
    binomial_cdf,
    certify,
    exit_risks,
    hoeffding,
    hoeffding_bentkus,
)
from model.transformer import Transformer, hidden_states, output_weights
from tests import tiny
from tests.probes import drawn

DELTA, EPSILON, UNITS, DRAWS = 0.1, 0.1, 100, 600
TRUE_RISK_T = np.linspace(0.02, 0.3, 15)
THRESHOLDS = tuple(np.linspace(1.0, 0.3, 15))


def draw_risks(random: np.random.RandomState) -> np.ndarray:
    """Risks of 0 or 1 with these means, the hardest case for the bounds; a unit that fails under a
    strict threshold fails under the looser ones.
    """
    return (random.rand(UNITS)[None] < TRUE_RISK_T[:, None]).astype(np.float64)


def failures(count: int, units: int) -> np.ndarray:
    """Risks of units of which some fail."""
    return (np.arange(units) < count).astype(np.float64)


def violations(choose) -> float:
    """How often the true risk of the chosen threshold exceeds delta."""
    random = np.random.RandomState(0)
    found = [choose(draw_risks(random)) for _ in range(DRAWS)]
    return float(np.mean([t is not None and TRUE_RISK_T[t] > DELTA for t in found]))


def certified(bound):
    def choose(risks):
        made = certify(risks, THRESHOLDS, delta=DELTA, epsilon=EPSILON, bound=bound)
        return None if made.threshold is None else THRESHOLDS.index(made.threshold)

    return choose


@pytest.mark.parametrize("bound", ["hoeffding", "hoeffding_bentkus", "betting"])
def test_the_promise_holds(bound):
    sigma = math.sqrt(EPSILON * (1 - EPSILON) / DRAWS)
    assert violations(certified(bound)) <= EPSILON + 3 * sigma


def test_choosing_by_the_average_breaks_it():
    """The wrong version: the loosest threshold whose empirical risk is at most delta."""

    def choose(risks):
        good = np.flatnonzero(risks.mean(axis=1) <= DELTA)
        return int(good[-1]) if len(good) else None

    assert violations(choose) > 3 * EPSILON


def test_the_tighter_bound_certifies_more():
    random = np.random.RandomState(1)
    pairs = [
        [certified(bound)(risks) or 0 for bound in ("hoeffding", "hoeffding_bentkus")]
        for risks in (draw_risks(random) for _ in range(100))
    ]
    plain, tight = np.array(pairs).T
    assert (tight >= plain).all()
    assert tight.mean() > plain.mean() + 0.5


def test_betting_needs_few_units_where_risks_are_even():
    """A mean of 3 in 1,000 is below 5 in 1,000: the other bounds can't tell from 3,000 units."""
    risks = np.random.RandomState(0).exponential(0.003, 3000).clip(0, 1)
    assert betting(risks, 0.005) < 0.05 < hoeffding_bentkus(risks, 0.005)
    assert betting(risks + 0.003, 0.005) > 0.5


def test_a_bet_never_sees_its_own_unit():
    """Capital after one unit is known before it: the first bet is none, the second from the first.

    The wrong version bets on unit j with unit j in the mean, and wins where nothing is to be won.
    """
    assert betting(np.array([0.0]), 0.1) == 1.0
    mean, variance = 0.05, (0.09 + 0.1**2) / 2  # of delta itself and a unit of 0
    bet = (0.1 - mean) / (variance + (0.1 - mean) ** 2)
    assert betting(np.array([0.0, 0.0]), 0.1) == pytest.approx(1 / (1 + bet * 0.1))


def test_bounds_by_hand():
    assert binomial_cdf(2, 5, 0.3) == pytest.approx(0.7**5 + 5 * 0.3 * 0.7**4 + 10 * 0.09 * 0.343)
    assert binomial_cdf(5, 5, 0.3) == pytest.approx(1.0)
    assert hoeffding(failures(10, 200), 0.1) == pytest.approx(math.exp(-2 * 200 * 0.05**2))
    assert hoeffding(failures(40, 200), 0.1) == hoeffding_bentkus(failures(40, 200), 0.1) == 1.0
    assert hoeffding_bentkus(failures(0, 50), 0.1) == pytest.approx(0.9**50)  # nothing failed
    # 3 of 30 at delta 0.4: e P(Bin(30, 0.4) <= 3), tighter than exp(-30 h1(0.1, 0.4))
    exact = sum(math.comb(30, k) * 0.4**k * 0.6 ** (30 - k) for k in range(4))
    h1 = 0.1 * math.log(0.1 / 0.4) + 0.9 * math.log(0.9 / 0.6)
    expected = min(math.e * exact, math.exp(-30 * h1))
    assert hoeffding_bentkus(failures(3, 30), 0.4) == pytest.approx(expected)


def test_testing_stops_at_the_first_failure():
    """A looser threshold that happens to look safe is not reached."""
    means = np.array([0.0, 0.5, 0.0])
    risks = np.repeat(means[:, None], 100, axis=1)
    made = certify(risks, (0.9, 0.8, 0.7), delta=0.1, epsilon=0.05)
    assert (made.threshold, made.risks, len(made.p_values)) == (0.9, [0.0, 0.5], 2)
    nothing = certify(risks[1:2], (0.9,), delta=0.1, epsilon=0.05)
    assert (nothing.threshold, nothing.risks) == (None, [0.5])


def test_risks_past_the_first_failure_are_not_asked_for():
    def one_by_one():
        yield np.full(100, 0.5)
        raise AssertionError("nothing follows a failure")

    assert certify(one_by_one(), (0.9, 0.8), delta=0.1, epsilon=0.05).threshold is None


@pytest.mark.parametrize(
    ("risks", "thresholds", "delta", "sentence"),
    [
        (np.zeros((2, 5)), (0.5, 0.9), 0.1, "thresholds must fall"),
        (np.full((2, 5), 1.5), (0.9, 0.5), 0.1, "clip them"),
        (np.zeros((1, 100)), (0.9, 0.5), 0.1, "threshold 0.5 have shape None, needed"),
        (np.zeros((2, 5)), (0.9, 0.5), 1.0, "delta=1.0 must lie"),
    ],
)
def test_arguments_that_void_the_guarantee_are_refused(risks, thresholds, delta, sentence):
    with pytest.raises(UserError, match=sentence):
        certify(risks, thresholds, delta=delta, epsilon=0.1)


def test_risks_are_the_clipped_increase_of_loss():
    config = tiny.model(pattern=tiny.model().pattern[1:], num_layers=3)
    model, variables = Transformer(config), drawn(config)
    windows = np.random.RandomState(0).randint(0, 300, (5, 13)).astype(np.int32)
    risks = np.stack(list(exit_risks(model, variables, windows, (2.0, 0.0), batch_size=3)))
    assert risks.shape == (2, 5)
    np.testing.assert_array_equal(risks[0], 0.0)

    def nats(layers):
        """By a model with its last layers left out, which is what leaving at once comes to."""
        short = tiny.model(pattern=config.pattern, num_layers=layers)
        params = variables["params"]
        kept = jax.tree.map(lambda x: x[:layers], params["periods"])
        cut = {"params": params | {"periods": kept}, "router_state": {}}
        positions = np.broadcast_to(np.arange(12, dtype=np.int32), (5, 12))
        read = jax.jit(lambda v: hidden_states(Transformer(short), v, windows[:, :-1], positions))
        hidden, _ = read(cut)
        log_p = jax.nn.log_softmax(hidden @ output_weights(model, variables), axis=-1)
        return -np.take_along_axis(np.asarray(log_p), windows[:, 1:, None], axis=2).mean((1, 2))

    expected = np.clip((nats(1) - nats(3)) / nats(3), 0, 1)
    np.testing.assert_allclose(risks[1], expected, atol=1e-5)
    assert (expected > 0).any()
