"""Alternating measurements of programs that each live in a process of their own.

Machines change speed from second to second, so two programs are compared round by round: a few
steps of the first, then of the second, and so on; only ratios within a round are quoted. While one
works the others wait, and waiting is not free: the kernel, or the host below it, takes back freed
memory, and after four seconds the next step takes twice its time. So each turn begins with steps
that are not timed. A worker calls `serve(step)`; the parent talks to it through `Worker`.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

WARM_STEPS = 2
"""Steps at the beginning of a turn that are not timed."""


@dataclass(frozen=True)
class Turn:
    first_seconds: float
    """Of the turn's first step; in the first turn, it compiles."""
    seconds: float
    """Mean of the timed steps."""
    peak_mb: float
    """Peak memory of the process so far."""


def serve(step: Callable[[], None], warm_steps: int = WARM_STEPS) -> None:
    """Takes turns: reads a number of steps from stdin, answers on stdout, until stdin ends.

    Args:
      warm_steps: before those of a turn; none where a step takes many seconds.
    """
    for line in sys.stdin:
        times = []
        for _ in range(warm_steps + int(line)):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        turn = [times[0], statistics.mean(times[warm_steps:]), peak_mb]
        print("TURN " + json.dumps(turn), flush=True)


class Worker:
    """A process that takes turns."""

    def __init__(self, name: str, command: Sequence[str], cwd: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def take_turn(self, steps: int) -> Turn:
        """Times `steps` steps.

        Raises:
          RuntimeError: the process died; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died before: the loop below says so
        for line in self._process.stdout:
            if line.startswith("TURN "):
                return Turn(*json.loads(line.removeprefix("TURN ")))
        raise RuntimeError(f"the worker {self.name!r} ended with code {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Series:
    """All turns of one worker."""

    first_seconds: float
    """The step that compiles."""
    seconds: list[float]
    """Per step, by round."""
    peak_mb: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(workers: Sequence[Worker], rounds: int, steps: int) -> list[Series]:
    """One turn each that is not counted, then `rounds` rounds of one turn each."""
    firsts = [worker.take_turn(1) for worker in workers]
    turns = [[worker.take_turn(steps) for worker in workers] for _ in range(rounds)]
    return [
        Series(
            first.first_seconds, [turn.seconds for turn in column], max(t.peak_mb for t in column)
        )
        for first, column in zip(firsts, zip(*turns, strict=True), strict=True)
    ]


def ratios(numerator: Series, denominator: Series) -> tuple[float, float, float]:
    """(median, least, greatest) of the round-by-round ratios of seconds."""
    values = [a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True)]
    return statistics.median(values), min(values), max(values)
