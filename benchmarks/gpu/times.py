"""Programs timed one at a time, in rounds; what the checks compiled is read, not compiled again.

A process of its own takes the cases from its standard input, as JSON, and prints a line for each.
"""

import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from benchmarks.gpu import torch_peers
from benchmarks.gpu.checks import calls_of, device_for, executable_path
from benchmarks.gpu.programs import (
    TURN_SECONDS,
    Looped,
    Program,
    abstract_results,
    compile_loop,
    poison,
    programs,
)
from benchmarks.gpu.roofline import case_of, work_of
from kernels.backend import Target, current_target

ROUNDS = 5
Call = Callable[[], float]
"""Takes a turn and returns the seconds of one call."""


def time_cases(
    chosen: dict[str, dict[str, int]], target: Target, folder: Path, deadline: float
) -> None:
    """Prints a line of JSON for each case, or that no time was left.

    Args:
      chosen: by case, the programs to time and their indices among the checked ones.
    """
    for name, labels in chosen.items():
        line: dict[str, Any] = {"case": name}
        if time.monotonic() > deadline:
            line["failure"] = "no time was left"
        else:
            try:
                line |= time_case(name, target, folder, labels)
            except Exception as problem:  # whatever it is, the next case is timed
                line["failure"] = said(problem)
        print(json.dumps(line), flush=True)


def said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem)[:300]}"


def time_case(
    name: str, target: Target, folder: Path, labels: dict[str, int], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Seconds per call of each program by round, and of PyTorch's on the same operands."""
    case = case_of(name)
    found, operands = programs(name, case, device_for(target))
    turns, failures = {}, {}
    for label, index in labels.items():
        try:
            turns[label] = _turn(found[label], executable_path(folder, name, index), name)
        except Exception as problem:
            failures[label] = said(problem)
    torch = torch_peers.available()
    if torch is not None:
        jax.block_until_ready(operands)  # torch has a stream of its own
        for label, call in torch_peers.peers(torch, case, operands).items():
            try:
                turns[label] = _torch_turn(torch, call)
            except Exception as problem:
                failures[label] = said(problem)
    seconds: dict[str, list[float]] = {label: [] for label in turns}
    for _ in range(rounds):
        for label, turn in turns.items():
            seconds[label].append(turn())
    return work_of(case)._asdict() | {"seconds": seconds, "failures": failures}


def load(path: Path, chosen: Program, calls: int) -> Looped:
    """The loop that a check compiled, or one compiled here."""
    if not path.exists():
        return compile_loop(chosen, calls)
    payload, calls = pickle.loads(path.read_bytes())
    leaves, results = jax.tree.leaves(chosen.operands), abstract_results(chosen)
    in_tree, out_tree = jax.tree.structure(((leaves, results), {})), jax.tree.structure(results)
    compiled = serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=jax.devices()[:1]
    )
    return Looped(compiled, calls)


def _turn(chosen: Program, path: Path, name: str) -> Call:
    """A turn of a program that has run once."""
    looped, leaves = load(path, chosen, calls_of(name)), jax.tree.leaves(chosen.operands)
    results = looped.compiled(leaves, poison(abstract_results(chosen)))
    jax.block_until_ready(results)

    def turn() -> float:
        nonlocal results
        began = time.perf_counter()
        results = jax.block_until_ready(looped.compiled(leaves, results))
        return (time.perf_counter() - began) / looped.calls

    return turn


def _torch_turn(torch: Any, call: Callable[[], Any]) -> Call:
    """The same of a call of PyTorch's; calls are queued one after the other."""

    def timed(calls: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    timed(1)
    calls = max(1, min(200, round(TURN_SECONDS / timed(2))))
    return lambda: timed(calls)


if __name__ == "__main__":
    time_cases(
        json.loads(sys.stdin.read()),
        current_target(),
        Path(sys.argv[1]),
        time.monotonic() + float(sys.argv[2]),
    )
