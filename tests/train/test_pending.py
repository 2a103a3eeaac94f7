"""Metrics on their way to the host: every step once, in order, an accelerator kept at work."""

import time

import jax.numpy as jnp
import pytest

from configs.checks import UserError
from configs.monitoring import MetricsConfig
from train.pending import FETCH_EVERY, PendingMetrics


def fetches(pending: PendingMetrics, steps: int) -> list[list[int]]:
    """The steps of each fetch when all that is due is fetched, and then the rest."""
    found = []
    for step in range(1, steps + 1):
        pending.add(step, {"loss": jnp.float32(10 * step)})
        if pending.is_due():
            measured = pending.fetch()
            assert [float(m.metrics["loss"]) for m in measured] == [10 * m.step for m in measured]
            found.append([m.step for m in measured])
    return [*found, [m.step for m in pending.fetch(whole=True)]]


@pytest.mark.parametrize(
    ("every", "platform", "expected"),
    [
        (None, "cpu", [[1], [2], [3], [4], []]),
        (3, "cpu", [[1, 2, 3], [4]]),
        (1, "gpu", [[1], [2], [3], [4]]),  # 2 is at work while 1 is fetched
        (2, "gpu", [[1, 2], [3, 4]]),
    ],
)
def test_every_step_comes_once_and_in_order(every, platform, expected):
    assert fetches(PendingMetrics(every, platform), 4) == expected


def test_accelerators_are_asked_rarely():
    found = fetches(PendingMetrics(None, "gpu"), 25)
    assert [len(steps) for steps in found] == [FETCH_EVERY, FETCH_EVERY, 5]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_seconds_are_those_that_went_by(platform):
    """What happens after `settle` or before `restart_clock` is not a step's time."""
    pending = PendingMetrics(2, platform)
    began, measured = time.monotonic(), []
    for step in range(1, 5):
        time.sleep(0.02)
        pending.add(step, {})
        if pending.is_due():
            measured += pending.fetch()
    pending.settle()
    worked = time.monotonic() - began
    time.sleep(0.2)  # a validation
    measured += pending.fetch(whole=True)
    pending.restart_clock()
    assert [m.step for m in measured] == [1, 2, 3, 4]
    total = sum(m.seconds for m in measured)
    assert 0.08 <= total <= worked
    pending.add(5, {})
    pending.settle()
    assert pending.fetch(whole=True)[0].seconds < 0.2


def test_the_last_step_takes_what_was_measured_after_it():
    pending = PendingMetrics(None, "gpu")
    pending.add(1, {"loss": 1.0})
    pending.add(2, {"loss": 2.0})
    pending.extend_last({"validation_loss": 3.0})
    first, second = pending.fetch(whole=True)
    assert (first.metrics, second.metrics) == ({"loss": 1.0}, {"loss": 2.0, "validation_loss": 3.0})


def test_fetching_never_is_refused():
    with pytest.raises(UserError, match=r"metrics\.fetch_every=0 must be at least 1"):
        MetricsConfig(fetch_every=0)
