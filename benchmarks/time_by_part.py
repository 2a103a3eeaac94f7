"""Time of a step by part of the model, from XLA's own trace.

XLA names every instruction after the code it came from; the trace says how long each ran on each
thread. Time inside a loop is counted once, at the instruction that spent it.
"""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

PARTS = {
    "experts: native products": r"moe/.*ffi_call",
    "attention: native": r"attention/.*ffi_call",
    "output layer and cross-entropy: native products": r"while/.*ffi_call",
    "experts: matrix products": r"moe/.*dot_general",
    "experts: everything else": r"moe/",
    "attention: matrix products": r"attention/.*(dot_general|transpose)",
    "attention: everything else": r"attention/",
    "output layer: matrix products": r"(BcD,DV|BcV,DV|BcD,BcV).*dot_general",
    "cross-entropy": r"jvp\(\)/while|logsumexp|closed_call/(reduce|exp|sub|select|jit)",
    "norms and residuals": r"norm|periods",
    "embedding": r"Transformer\)/gather|scatter",
}
"""First pattern that an instruction's origin matches; the optimiser is what matches none.

A native kernel is seen on the thread that calls it, not on those that help it: its thread-seconds
are as many times these as threads work on it.
"""

OPTIMIZER = "optimiser and gradient norm"


def profile(block: Callable[[], object], hlo: str) -> dict[str, float]:
    """Thread-seconds by part over one block, and "total".

    Args:
      hlo: text of the compiled program, which names the instructions' origins.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            block()
        trace = next(Path(folder).rglob("perfetto_trace.json.gz"))
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    origins = _origins(hlo)
    seconds: dict[str, float] = collections.defaultdict(float)
    for name, own in _own_times(events):
        seconds[_part(origins.get(name, ""))] += own / 1e6
    parts = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return parts | {"total": sum(parts.values())}


def _origins(hlo: str) -> dict[str, str]:
    found = {}
    for line in hlo.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        origin = re.search(r'op_name="([^"]*)"', line)
        if instruction and origin:
            found[instruction.group(1)] = origin.group(1)
    return found


def _own_times(events: list[dict]) -> list[tuple[str, float]]:
    """(instruction, microseconds not spent in instructions inside it) per event of each thread."""
    threads: dict[tuple[int, int], list[dict]] = collections.defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in (event.get("args") or {}):
            threads[event["pid"], event["tid"]].append(event)
    own = []
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[dict] = []
        for event in thread:
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            event["own"] = event["dur"]
            if stack:
                stack[-1]["own"] -= event["dur"]
            stack.append(event)
        own += [(event["name"], event["own"]) for event in thread]
    return own


def _part(origin: str) -> str:
    if not origin:
        return "moves without a name"
    return next((part for part, p in PARTS.items() if re.search(p, origin)), OPTIMIZER)
