"""Alternating measurements of programs that each live in a process of their own.

Machines change speed from second to second, so two programs are compared round by round: one block
of work of the first, then of the second, and so on; only ratios within a round are quoted. While
one works the others wait. A worker calls `serve(block)`; the parent talks to it through `Worker`.
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


def serve(block: Callable[[], None]) -> None:
    """Runs `block` whenever asked and answers with its seconds and the peak memory so far.

    The first call is timed on its own: it compiles.
    """
    for _ in sys.stdin:
        began = time.perf_counter()
        block()
        seconds = time.perf_counter() - began
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print("BLOCK " + json.dumps([seconds, peak_mb]), flush=True)


class Worker:
    """A process that serves blocks."""

    def __init__(self, name: str, command: Sequence[str], cwd: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def block(self) -> tuple[float, float]:
        """Seconds of one block, and the process's peak memory in MB.

        Raises:
          RuntimeError: the process died; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("block\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died before: the loop below says so
        for line in self._process.stdout:
            if line.startswith("BLOCK "):
                seconds, peak_mb = json.loads(line.removeprefix("BLOCK "))
                return seconds, peak_mb
        raise RuntimeError(f"the worker {self.name!r} ended with code {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Series:
    """Blocks of one worker."""

    first_seconds: float
    """The block that compiles."""
    seconds: list[float]
    peak_mb: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(workers: Sequence[Worker], rounds: int) -> list[Series]:
    """One first block each, then `rounds` rounds of one block each, in turn."""
    firsts = [worker.block()[0] for worker in workers]
    for worker in workers:
        worker.block()  # the second block still warms caches and allocators
    blocks = [[worker.block() for worker in workers] for _ in range(rounds)]
    return [
        Series(first, [seconds for seconds, _ in column], max(peak for _, peak in column))
        for first, column in zip(firsts, zip(*blocks, strict=True), strict=True)
    ]


def ratios(numerator: Series, denominator: Series) -> tuple[float, float, float]:
    """(median, least, greatest) of the round-by-round ratios of seconds."""
    values = [a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True)]
    return statistics.median(values), min(values), max(values)
