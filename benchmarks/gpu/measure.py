"""A case on a GPU: its result checked, then its program and its peers timed in alternating rounds.

Calls of a turn are queued one after the other and waited for once, as a model's would be, so that
the host's part is hidden. Operands that fit into the L2 cache stay there from call to call: the
share of the bound may then exceed 1.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.gpu import operands as drawn
from benchmarks.gpu.peers import peers
from benchmarks.gpu.roofline import Bound, bound, case_of, work_of
from kernels.backend import Target
from kernels.compile_checks.cases import program
from kernels.compile_checks.devices import DEVICES, Device
from kernels.compile_checks.work import Work
from parallel.topology import Accelerator

TURN_SECONDS = 0.05
"""About what the calls of one turn take together."""
MOST_CALLS = 200
LARGEST_ERROR = 0.02
"""Of the largest value: results in bfloat16, of weights that were rounded to it (2^-9 each)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One case on one device."""

    name: str
    error: float
    """Largest difference from the float32 reference, in parts of its largest value."""
    seconds: dict[str, list[float]]
    """Per call, by program and round; "ours" is ours."""
    failures: dict[str, str]
    """Peers that did not run, and what they said."""
    work: Work
    bound: Bound | None
    """None: a device whose data sheet is not known here."""

    @property
    def is_right(self) -> bool:
        return self.error <= LARGEST_ERROR

    def median(self, program: str) -> float:
        return statistics.median(self.seconds[program])

    def teraflops(self, program: str) -> float:
        return self.work.flops / self.median(program) / 1e12

    def gigabytes(self, program: str) -> float:
        """Per second, of the least bytes."""
        return self.work.least_bytes / self.median(program) / 1e9

    def share(self, program: str) -> float | None:
        """Of the bound: 1 would be the device's peak."""
        return None if self.bound is None else self.bound.seconds / self.median(program)

    def ratio(self, program: str) -> tuple[float, float, float]:
        """How many times as fast ours is as the program: median, least and most over the rounds."""
        pairs = zip(self.seconds["ours"], self.seconds[program], strict=True)
        values = [theirs / ours for ours, theirs in pairs]
        return statistics.median(values), min(values), max(values)


def device_for(target: Target) -> Device:
    """The compile checks' device whose cases and limits are the target's."""
    known = DEVICES["sm_90a" if target.capability >= 90 else "sm_80"]
    return dataclasses.replace(known, target=target)


def measure(name: str, target: Target, accelerator: Accelerator | None, rounds: int) -> Timing:
    """Checks and times a case; one whose result is wrong is not timed.

    Args:
      accelerator: the data sheet; None where it is not known.
    """
    case = case_of(name)
    operands = drawn.draw(case)
    ours = functools.partial(jax.jit(program(name, device_for(target)).function), *operands)
    error = drawn.error(ours(), drawn.expected(case, operands))
    facts = (work_of(case), None if accelerator is None else bound(case, accelerator))
    if not error <= LARGEST_ERROR:  # NaN, too
        return Timing(name, error, {}, {}, *facts)
    programs, failures = _running({"ours": ours, **peers(case, operands, target.capability)})
    return Timing(name, error, in_turn(programs, rounds), failures, *facts)


def _running(
    programs: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that run, compiled and warm, and what the others raised."""
    found, failures = {}, {}
    for name, call in programs.items():
        try:
            jax.block_until_ready(call())
        except Exception as problem:  # of somebody else's kernel: whatever it is, it is reported
            if name == "ours":
                raise
            failures[name] = f"{type(problem).__name__}: {str(problem)[:200]}"
        else:
            found[name] = call
    return found, failures


def in_turn(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each, by round; each turn begins with a call that is not timed."""
    calls = {name: _calls(call) for name, call in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, call in programs.items():
            jax.block_until_ready(call())
            seconds[name].append(_time(call, calls[name]))
    return seconds


def _time(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call of so many that follow each other."""
    began = time.perf_counter()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - began) / calls


def _calls(call: Callable[[], Any]) -> int:
    """How many calls make a turn."""
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / _time(call, 1))))
