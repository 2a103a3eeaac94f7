"""Every program of every case compiled and run on the device, by many processes at once.

A process takes one case after the other and says of each program, in a line of JSON, whether its
result is right, and the same when it is made again: a difference would be a race. What it compiled
is kept for the timing. A fault that ends a process (an illegal address), or a kernel that waits for
ever, is its case's; another process goes on with the rest.
"""

import dataclasses
import json
import os
import pickle
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compile_checks.devices import DEVICES, Device
from benchmarks.gpu import operands as drawn
from benchmarks.gpu.programs import (
    OURS,
    Program,
    abstract_results,
    compile_loop,
    kind_of,
    num_calls,
    poison,
    programs,
    save,
)
from benchmarks.gpu.roofline import bound, case_of
from configs.accelerators import H100
from kernels.backend import Target, current_target

LARGEST_ERROR = 0.02
"""A result's, of the largest value: bfloat16, of weights that were rounded to it (2^-9 each)."""
LARGEST_NORM_ERROR = 0.01
"""A difference's norm, in parts of the result's."""
CASE_SECONDS = 40.0
"""After which a process that says nothing is stopped: its kernel waits for ever."""
ATTEMPTS = 6
"""At a case for which the others leave too little memory."""

Line = dict[str, Any]


def device_for(target: Target) -> Device:
    """The compile checks' device whose cases and limits are the target's."""
    known = DEVICES["sm_90a" if target.capability >= 90 else "sm_80"]
    return dataclasses.replace(known, target=target)


def calls_of(name: str) -> int:
    """Runs of each program of a case in one turn, by one data sheet: so it is one program."""
    return num_calls(bound(case_of(name), H100))


def is_right(line: Line) -> bool:
    """Whether a program's result is near enough, and was the same twice; False for NaN."""
    near = line["error"] <= LARGEST_ERROR and line["norm_error"] <= LARGEST_NORM_ERROR
    return bool(near and line["is_repeated"])


# --- In a worker ---------------------------------------------------------------------------------


def check_cases(names: Sequence[str], target: Target, folder: Path, kinds: Sequence[str]) -> None:
    """Checks the cases one after the other and prints a line of JSON for each program."""
    for name in names:
        print(json.dumps({"begins": name}), flush=True)
        for attempt in range(ATTEMPTS):
            try:
                for line in check_case(name, target, folder, kinds):
                    print(json.dumps(line), flush=True)
                break
            except Exception as problem:  # whatever it is, the next case is tried
                said = f"{type(problem).__name__}: {str(problem)[:400]}"
                if is_short_of_memory(problem) and attempt + 1 < ATTEMPTS:
                    time.sleep(2 + 3 * random.random())
                    continue
                print(json.dumps({"case": name, "program": OURS, "failure": said}), flush=True)
                break


def is_short_of_memory(problem: Exception) -> bool:
    """Whether the device had too little memory free, which others may give back."""
    said = str(problem)
    return "RESOURCE_EXHAUSTED" in said and "hared memory" not in said


def check_case(name: str, target: Target, folder: Path, kinds: Sequence[str]) -> Iterator[Line]:
    """Yields a line for each of the case's programs of these kinds (programs.kind_of)."""
    case, calls = case_of(name), calls_of(name)
    found, operands = programs(name, case, device_for(target))
    wanted = jax.tree.leaves(drawn.expected(case, operands))
    for index, (label, chosen) in enumerate(found.items()):
        if kind_of(label) not in kinds:
            continue
        line: Line = {"case": name, "program": label, "index": index}
        began = time.monotonic()
        try:
            looped = compile_loop(chosen, calls)
            line["compile_seconds"] = time.monotonic() - began
            results = [_run(looped.compiled, chosen) for _ in range(2)]
            kept = pickle.dumps((save(looped), calls))
            executable_path(folder, name, index).write_bytes(kept)
        except Exception as problem:  # of one program: the others are tried
            if is_short_of_memory(problem):
                raise
            yield line | {"failure": f"{type(problem).__name__}: {str(problem)[:400]}"}
            continue
        yield line | _judged(results, wanted) if kind_of(label) != "peers" else line


def executable_path(folder: Path, name: str, index: int) -> Path:
    """Where a case's compiled program lies, by its index among the case's."""
    return folder / f"{name.replace('/', '-')}-{index}.bin"


def _run(compiled: Any, chosen: Program) -> list[jax.Array]:
    leaves = jax.tree.leaves(chosen.operands)
    return jax.block_until_ready(compiled(leaves, poison(abstract_results(chosen))))


def _judged(results: list[list[jax.Array]], wanted: list[jax.Array]) -> Line:
    """On the device: results are of gigabytes, and one core of the host would take seconds."""
    first, second = results
    return {
        "error": drawn.error(first, wanted),
        "norm_error": max(float(_norm_error(*pair)) for pair in zip(first, wanted, strict=True)),
        "is_repeated": all(bool(_is_same(*pair)) for pair in zip(first, second, strict=True)),
    }


@jax.jit
def _norm_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """The difference's norm, in parts of that of what is wanted."""
    wanted = wanted.astype(jnp.float32)
    difference = found.astype(jnp.float32) - wanted
    return jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(wanted.ravel())


@jax.jit
def _is_same(first: jax.Array, second: jax.Array) -> jax.Array:
    """Whether all entries of two arrays are equal; NaN equals nothing."""
    return (first == second).all()


# --- Of the workers ------------------------------------------------------------------------------


def check_all(
    names: Sequence[str], workers: int, command: Sequence[str], deadline: float
) -> Iterator[Line]:
    """Yields the lines of all cases as they come; a case that was not checked has one saying why.

    Args:
      command: starts a worker, with names joined by commas as the last argument.
      deadline: by time.monotonic(), when workers are stopped.
    """
    lines: queue.Queue[Line | None] = queue.Queue()
    shares = [share for i in range(workers) if (share := list(names[i::workers]))]
    for share in shares:
        arguments = (share, command, lines, deadline)
        threading.Thread(target=_work, args=arguments, daemon=True).start()
    ended = 0
    while ended < len(shares):
        line = lines.get()
        if line is None:
            ended += 1
        else:
            yield line


def _work(names: list[str], command: Sequence[str], lines: Any, deadline: float) -> None:
    while names and time.monotonic() < deadline:
        names = _one_process(names, command, lines, deadline)
    for name in names:
        lines.put({"case": name, "program": OURS, "failure": "no time was left"})
    lines.put(None)


def _one_process(
    names: list[str], command: Sequence[str], lines: Any, deadline: float
) -> list[str]:
    """Runs a worker until it ends; returns the cases that are left."""
    process = subprocess.Popen(
        [*command, ",".join(names)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},  # gives back what is free
    )
    heard, errors = [time.monotonic()], []
    watchers = [
        threading.Thread(target=_stop_late, args=(process, heard, deadline), daemon=True),
        threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True),  # pyright: ignore[reportOptionalMemberAccess]
    ]
    for watcher in watchers:
        watcher.start()
    current = None
    assert process.stdout is not None
    for text in process.stdout:
        heard[0] = time.monotonic()
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        if "begins" in line:
            current = line["begins"]
        else:
            lines.put(line)
    code = process.wait()
    watchers[1].join(5)
    if code == 0:
        return []
    failed = names[0] if current is None else current
    said = "".join(errors)[-600:] if code > 0 else "stopped, or ended by a signal"
    lines.put({"case": failed, "program": OURS, "failure": f"exit code {code}: {said}"})
    return names[names.index(failed) + 1 :]


def _stop_late(process: Any, heard: list[float], deadline: float) -> None:
    while process.poll() is None:
        now = time.monotonic()
        if now > deadline or now > heard[0] + CASE_SECONDS:
            process.kill()
        time.sleep(0.2)


if __name__ == "__main__":
    check_cases(sys.argv[3].split(","), current_target(), Path(sys.argv[1]), sys.argv[2].split(","))
