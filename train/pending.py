"""Metrics of the last steps, on the devices until several are fetched at once."""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

FETCH_EVERY = 10
"""Steps whose metrics are fetched at once from an accelerator, unless the run says otherwise."""


class Measured(NamedTuple):
    """One step as the log needs it."""

    step: int
    metrics: dict[str, Any]
    """See train/step.py; on the host."""
    seconds: float
    """Wall time, the wait for its batch included; the mean of steps that ended together."""
    waited: float = 0.0
    """Seconds of the host's wait for its batch."""


@dataclass
class _Waiting:
    step: int
    metrics: dict[str, Any]
    waited: float
    seconds: float | None = None


class PendingMetrics:
    """Metrics of steps that an accelerator works on or has done, in the order of the steps.

    The last step dispatched stays out of a fetch, so that the accelerator has work while the host
    reads. On the CPU each step is waited for: collectives of two steps in flight can starve each
    other.
    """

    def __init__(self, fetch_every: int | None, platform: str) -> None:
        """
        Args:
          fetch_every: see MetricsConfig.
          platform: of the devices.
        """
        self._waits = platform == "cpu"
        self._every = fetch_every or (1 if self._waits else FETCH_EVERY)
        self._steps: list[_Waiting] = []
        self._since = time.monotonic()

    def add(self, step: int, metrics: dict[str, Any], waited: float = 0.0) -> None:
        """Takes what a step that was dispatched will report, and how long its batch was waited
        for.
        """
        self._steps.append(_Waiting(step, metrics, waited))
        if self._waits:
            self.settle()

    def is_due(self) -> bool:
        """Whether it is time to fetch."""
        return len(self._steps) >= self._every + self._in_flight

    def settle(self) -> None:
        """Returns when the devices have done all steps; what comes now is not in their time."""
        jax.block_until_ready([waiting.metrics for waiting in self._steps])
        self._end(self._steps)

    def extend_last(self, metrics: dict[str, Any]) -> None:
        """Adds to the metrics of the last step; on the CPU they are waited for, too."""
        self._steps[-1].metrics = self._steps[-1].metrics | metrics
        if self._waits:
            jax.block_until_ready(metrics)

    def fetch(self, *, whole: bool = False) -> list[Measured]:
        """Takes the steps that are done to the host, in one transfer.

        Args:
          whole: waits for the last one dispatched, too.
        """
        count = len(self._steps) - (0 if whole else self._in_flight)
        taken, self._steps = self._steps[:count], self._steps[count:]
        metrics = jax.device_get([waiting.metrics for waiting in taken])
        self._end(taken)
        pairs = zip(taken, metrics, strict=True)
        return [
            Measured(done.step, found, done.seconds or 0.0, done.waited) for done, found in pairs
        ]

    def restart_clock(self) -> None:
        """Leaves the time since the last step ended out of the next one's, if none is at work."""
        if all(waiting.seconds is not None for waiting in self._steps):
            self._since = time.monotonic()

    @property
    def _in_flight(self) -> int:
        return 0 if self._waits else 1

    def _end(self, steps: list[_Waiting]) -> None:
        """Shares the time since steps last ended among these, but for those that ended before."""
        now = time.monotonic()
        ended = [waiting for waiting in steps if waiting.seconds is None]
        for waiting in ended:
            waiting.seconds = (now - self._since) / len(ended)
        if ended:
            self._since = now
