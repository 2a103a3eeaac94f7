"""The parts of the GPU report, each in a process of its own that is stopped when its time is over.

A part writes what it has after each step, so that what was measured before a fault, or before its
time was over, is kept. Parts: kernels (right, and how fast), training, decoding.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.compile_checks.cases import NAMES
from benchmarks.gpu import ceilings, decoding, training
from benchmarks.gpu.checks import check_all, is_right
from benchmarks.gpu.environment import environment
from benchmarks.gpu.programs import OURS, kind_of
from formats.atomic_folder import replace_text
from kernels.backend import current_target

SHARES = {"kernels": 0.5, "training": 0.2, "decoding": 0.3}
"""Of the report's minutes."""
CHECKING = 0.55
"""Of the kernels' time; the rest is for timing."""
WORKER_BYTES = 9e9
"""Of memory that a checking process may come to hold; so many go on at once as the card holds."""
WHERE = "{}.where"
"""A part's file of the calls it was in when its time was nearly over."""
ROOT = Path(__file__).resolve().parents[2]

Result = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a part is asked for."""

    folder: Path
    """Where its result, and what it compiles, go."""
    seconds: float
    prefixes: tuple[str, ...] = ("",)
    """Beginnings of the names of the kernels' cases."""
    kinds: tuple[str, ...] = ("ours", "peers")
    """Of their programs; "sizes" tries other tiles and blocks, too."""

    @property
    def names(self) -> list[str]:
        """The cases, in the order of the prefixes."""
        found = [name for prefix in self.prefixes for name in NAMES if name.startswith(prefix)]
        return list(dict.fromkeys(found))


def run_part(name: str, request: Request) -> Result:
    """Runs a part in a process of its own; "failure" says why its result is not whole."""
    request.folder.mkdir(parents=True, exist_ok=True)
    path = request.folder / f"{name}.json"
    path.unlink(missing_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(request.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    arguments = [",".join(request.prefixes), ",".join(request.kinds)]
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, str(request.folder)]
    failure = run_group([*command, str(request.seconds), *arguments], request.seconds + 5, cache)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if failure is None else found | {"failure": failure}


def run_group(command: list[str], seconds: float, variables: dict[str, str]) -> str | None:
    """Runs a command from the repository's root; returns why it did not end well, or None.

    Processes that it started end with it: one that went on would hold the next part's GPU.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        return None if code == 0 else f"exit code {code}: {errors.read()[-800:]}"


def has_gpu() -> bool:
    """Whether this machine has a CUDA GPU that runs the kernels; asked in another process, for one
    that asks by itself takes most of the GPU's memory.
    """
    code = "from kernels.backend import *; t = current_target(); print(t.platform, runs_triton(t))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split()[-2:] == ["cuda", "True"]


# --- In the part's process -----------------------------------------------------------------------


def kernels(request: Request, keep: Callable[[Result], None]) -> None:
    """Every case checked by many processes, then timed by one."""
    began = time.monotonic()
    folder = request.folder / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    result = _in_a_process("card", request)
    result["cases"] = cases = {}
    command = [sys.executable, "-m", "benchmarks.gpu.checks", str(folder), ",".join(request.kinds)]
    workers = max(1, min(os.cpu_count() or 1, int(result["memory"] / WORKER_BYTES)))
    until = began + CHECKING * request.seconds
    chosen: dict[str, dict[str, int]] = {}
    for line in check_all(request.names, workers, command, until):
        entry = cases.setdefault(line["case"], {"checks": {}, "failures": {}})
        if "failure" in line:
            entry["failures"][line["program"]] = line["failure"]
        else:
            if "error" in line:
                figures = ("error", "norm_error", "is_repeated", "compile_seconds")
                entry["checks"][line["program"]] = {key: line[key] for key in figures}
            if kind_of(line["program"]) == "peers" or is_right(line):
                chosen.setdefault(line["case"], {})[line["program"]] = line["index"]
    keep(result)
    left = request.seconds - (time.monotonic() - began) - 3
    for line in _timed(chosen, folder, left):
        keep(result)
        entry = cases[line["case"]]
        if "failure" in line:
            entry["failures"]["timing"] = line["failure"]
        else:
            entry["failures"] |= line.pop("failures")
            entry |= {key: value for key, value in line.items() if key != "case"}
    keep(result)


def card(request: Request, keep: Callable[[Result], None]) -> None:
    """Which card it is, and what it reaches at best."""
    stats = jax.devices()[0].memory_stats() or {}
    facts = {"memory": stats.get("bytes_limit", 8e9), "capability": current_target().capability}
    keep(environment() | facts | {"ceilings": ceilings.measure_ceilings()})


def train(request: Request, keep: Callable[[Result], None]) -> None:
    """A training step, ours and then the peer's."""
    began = time.monotonic()
    result = _in_a_process("training_ours", request)
    keep(result)
    result["small"] = {
        name: _in_a_process("small_losses", request, platforms)["losses"]
        for name, platforms in {"here": None, "cpu": "cpu"}.items()
    }
    keep(result)
    left = request.seconds - (time.monotonic() - began)
    result["peer"] = training.measure_peer(training.olmoe_run(), training.STEPS, left)
    keep(result)


def train_ours(request: Request, keep: Callable[[Result], None]) -> None:
    run = training.olmoe_run()
    result = environment() | {"ours": training.measure(run, training.STEPS, request.folder)}
    keep(result)
    with training.balanced_routing():
        keep(result | {"balanced": training.measure(run, training.STEPS)})


def small_losses(request: Request, keep: Callable[[Result], None]) -> None:
    """Losses of a small model's first steps, to compare devices by."""
    run = training.shrunk(training.olmoe_run(num_layers=2, rows=2, length=256))
    keep({"losses": training.measure(run, training.STEPS)["losses"]})


def decode(request: Request, keep: Callable[[Result], None]) -> None:
    """Decoding in every format, ours and then the peer's."""
    began = time.monotonic()
    result = _in_a_process("decoding_ours", request, seconds=decoding.OURS * request.seconds)
    keep(result)
    left = request.seconds - (time.monotonic() - began)
    result["peer"] = decoding.measure_peer(decoding.olmoe_model(), decoding.BATCHES, left)
    keep(result)


def decode_ours(request: Request, keep: Callable[[Result], None]) -> None:
    result: Result = environment() | {"ours": [], "engine": []}
    model = decoding.olmoe_model()
    for found in decoding.measure_all(model):
        result["ours"].append(found)
        keep(result)
    for weights, batch in decoding.BY_ENGINE:
        result["engine"].append(decoding.measure_engine(model, weights, batch))
        keep(result)


Part = Callable[[Request, Callable[[Result], None]], None]
PARTS: dict[str, Part] = {
    "card": card,
    "kernels": kernels,
    "training": train,
    "training_ours": train_ours,
    "small_losses": small_losses,
    "decoding": decode,
    "decoding_ours": decode_ours,
}


def _in_a_process(
    name: str, request: Request, platforms: str | None = None, seconds: float | None = None
) -> Result:
    """The result of a part that must give the device back before the next begins.

    Args:
      platforms: JAX's, such as "cpu"; None: those of the machine.
      seconds: after which it is stopped, and what it has is taken; None: with the whole part.
    Raises:
      RuntimeError: it failed before it had anything.
    """
    path = request.folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", name, str(request.folder)]
    command += [str(seconds or request.seconds), "", ""]
    chosen = {} if platforms is None else {"JAX_PLATFORMS": platforms}
    failure = None
    try:
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | chosen, timeout=seconds)
    except subprocess.CalledProcessError as problem:
        failure = f"{name}: exit code {problem.returncode}"
    except subprocess.TimeoutExpired as late:
        failure = f"{name}: stopped after {late.timeout:.0f} s{_last_seen(request.folder, name)}"
    if not path.exists():
        raise RuntimeError(failure)
    found = json.loads(path.read_text())
    return found if failure is None else found | {"failure": failure}


def _last_seen(folder: Path, name: str) -> str:
    """Where a part's main thread was when its time was over, the innermost calls first."""
    path = folder / WHERE.format(name)
    lines = path.read_text().rpartition("Thread ")[2].splitlines() if path.exists() else []
    calls = [line.rpartition("/")[2].replace('"', "") for line in lines[1:6]]
    return f", in {'; '.join(calls)}" if calls else ""


def _timed(chosen: dict[str, dict[str, int]], folder: Path, seconds: float) -> Iterator[Result]:
    """Yields the lines of the timing process as they come."""
    if seconds <= 0 or not chosen:
        return
    command = [sys.executable, "-m", "benchmarks.gpu.times", str(folder), str(seconds)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # torch needs some, too
    ordered = dict(sorted(chosen.items(), key=lambda item: OURS not in item[1]))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        process.stdin.write(json.dumps(ordered))
    yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    process.wait()


def main(argv: list[str]) -> None:
    name, folder, seconds, prefixes, kinds = argv
    request = Request(
        Path(folder), float(seconds), tuple(prefixes.split(",")), tuple(kinds.split(","))
    )
    where = (request.folder / WHERE.format(name)).open("w")
    faulthandler.dump_traceback_later(0.9 * request.seconds, file=where)  # it began later

    def keep(result: Result) -> None:
        replace_text(request.folder / f"{name}.json", json.dumps(result))

    PARTS[name](request, keep)


if __name__ == "__main__":
    main(sys.argv[1:])
