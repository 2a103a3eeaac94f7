"""Cases compiled in processes of their own, and the results that the repository keeps."""

import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compile_checks.cases import NAMES, runs_on
from benchmarks.compile_checks.devices import DEVICES, Device
from benchmarks.compile_checks.facts import Facts
from benchmarks.compile_checks.gate import program_hash
from configs.checks import require
from formats.small_files import read_json_object

COMMITTED = Path(__file__).resolve().parent / "compiled.json"
RESTORE = f"git checkout {COMMITTED} brings it back"
SAMPLE = 4
"""Cases that are compiled again although nothing of theirs changed."""
TOOLS = ("jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
PROCESSES = 2
SECONDS = 300

KEYS = [
    f"{name}/{architecture}"
    for name in NAMES
    for architecture, device in DEVICES.items()
    if runs_on(name, device)
]


def split(key: str) -> tuple[str, Device]:
    """The case's name and its device."""
    name, architecture = key.rsplit("/", 1)
    return name, DEVICES[architecture]


def read_committed() -> dict[str, Any]:
    """{"tools": versions, "cases": {key: {"program": hash, and the fields of Facts}}}.

    Raises:
      UserError: the file is damaged.
    """
    if not COMMITTED.exists():
        return {"tools": {}, "cases": {}}
    found = read_json_object(COMMITTED, RESTORE)
    is_table = {"tools", "cases"} <= set(found) and isinstance(found["cases"], dict)
    require(is_table, f"{COMMITTED} has no tools and cases: {RESTORE}")
    return found


def committed_facts(entry: dict[str, Any]) -> Facts:
    return Facts(**{what: value for what, value in entry.items() if what != "program"})


def write(results: dict[str, Facts]) -> None:
    """Keeps these results, and of the committed ones those that still are cases."""
    cases = {k: v for k, v in read_committed()["cases"].items() if k in KEYS}
    for key, facts in results.items():
        cases[key] = {"program": program_hash(*split(key)), **asdict(facts)}
    content = {"tools": tool_versions(), "cases": dict(sorted(cases.items()))}
    COMMITTED.write_text(json.dumps(content, indent=1) + "\n")


def tool_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in TOOLS}


def chosen() -> list[str]:
    """What changed since the committed results, and a random sample of the rest.

    With another compiler than that of the results, a sample of all.
    """
    committed, changed = read_committed(), []
    if committed["tools"] == tool_versions():
        hashes = {key: entry["program"] for key, entry in committed["cases"].items()}
        changed = [key for key in KEYS if hashes.get(key) != program_hash(*split(key))]
    rest = [key for key in KEYS if key not in changed]
    return changed + random.sample(rest, min(SAMPLE, len(rest)))


def compile_all(keys: Iterable[str]) -> Iterator[tuple[str, Facts | str]]:
    """Yields each case with its facts, or with what its process said before it failed."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        keys = list(keys)
        yield from zip(keys, pool.map(_in_a_process, keys), strict=True)


def _in_a_process(key: str) -> Facts | str:
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "scripts.check_kernels", "--child", dump, key]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={dump}",
            "MOSAIC_GPU_DUMP_TO": dump,
        }
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"no result after {SECONDS} s"
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr[-1500:]}"
    return Facts(**json.loads(done.stdout.splitlines()[-1]))
