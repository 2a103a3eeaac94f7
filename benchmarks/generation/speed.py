"""Speed of generation, beside llama.cpp and transformers, in alternating rounds.

Machines change speed from second to second: one round takes each measure of every program, one
program after the other, and ratios are taken within a round. Ours keeps keys and values in float32,
as transformers does; llama.cpp in float16.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.generation.programs import TRANSFORMERS_NAME, Programs, llama_name, our_name
from benchmarks.generation.programs import programs as all_programs
from benchmarks.generation.work import MEASURES, make_work
from benchmarks.generation.worker import Program, Worker, WorkerFailure, started
from infer.sources import Source

RESTS = 0.3
"""Seconds before each turn, in which waiting threads of the program before leave the cores."""

PAIRS = (
    (our_name("float32"), llama_name("F32")),
    (our_name("int8"), llama_name("Q8_0")),
    (our_name("int4"), llama_name("Q4_0")),
    (our_name("int4_affine"), llama_name("Q4_1")),
    (our_name("float32"), TRANSFORMERS_NAME),
)
"""Programs with about equally many bits of a weight."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 7
    prompt: int = 32
    """Tokens before those that are decoded."""
    tokens: int = 64
    """Decoding steps of a turn."""
    prefill: int = 512
    """Tokens of the prompt whose reading is timed."""
    python: str = ""
    """The interpreter that has torch and transformers."""


@dataclass(frozen=True)
class Speeds:
    """One program's."""

    program: str
    weight_bytes: int
    version: str
    tokens_per_second: dict[str, list[float]]
    """By measure, one for each round."""


def measure(source: Source, settings: Settings) -> tuple[list[Speeds], dict[str, str]]:
    """All programs that can be run here, and why others can't."""
    work = make_work(
        source.config.vocab_size,
        prompt=settings.prompt,
        tokens=settings.tokens,
        long_prompt=settings.prefill,
    )
    with tempfile.TemporaryDirectory() as folder:
        return alternate(all_programs(source, work, Path(folder), settings.python), settings.rounds)


def alternate(programs: Programs, rounds: int) -> tuple[list[Speeds], dict[str, str]]:
    """Each program's speeds, and why some have none.

    Raises:
      WorkerFailure: one of ours died, or a peer that had begun to work.
    """
    left_out = dict(programs.left_out)
    with contextlib.ExitStack() as opened:
        workers: list[Worker] = []
        for program in programs.found:
            worker = _warmed(program, opened, left_out)
            if worker is not None:
                workers.append(worker)
        speeds = {w.program.name: {name: [] for name in MEASURES} for w in workers}
        for _ in range(rounds):
            for name in MEASURES:
                for worker in workers:
                    time.sleep(RESTS)
                    speeds[worker.program.name][name].append(worker.take(name))
        made = [
            Speeds(
                w.program.name,
                w.facts["weight_bytes"],
                w.facts["version"],
                speeds[w.program.name],
            )
            for w in workers
        ]
    return made, left_out


def _warmed(
    program: Program, opened: contextlib.ExitStack, left_out: dict[str, str]
) -> Worker | None:
    """The program after a turn of each measure, which compiles and is not counted."""
    try:
        worker = opened.enter_context(started(program))
        for name in MEASURES:
            worker.take(name)
    except WorkerFailure as failure:
        if not program.is_peer:
            raise
        left_out[program.name] = str(failure)
        return None
    return worker


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is, over the rounds."""

    ours: str
    peer: str
    measure: str
    median: float
    least: float
    most: float


def ratios(speeds: list[Speeds]) -> list[Ratio]:
    """Of the PAIRS that were both measured."""
    by_name = {s.program: s.tokens_per_second for s in speeds}
    made = []
    for ours, peer in PAIRS:
        if ours not in by_name or peer not in by_name:
            continue
        for name in MEASURES:
            pairs = zip(by_name[ours][name], by_name[peer][name], strict=True)
            values = [a / b for a, b in pairs]
            spread = (statistics.median(values), min(values), max(values))
            made.append(Ratio(ours, peer, name, *spread))
    return made


def print_speeds(speeds: list[Speeds], left_out: dict[str, str], settings: Settings) -> None:
    """Tokens per second, median (least to most) over the rounds; then the ratios."""
    titles = {name: name for name in MEASURES} | {MEASURES[-1]: f"prefill {settings.prefill}"}
    table = Table("program", "weights MB", *(titles[name] for name in MEASURES))
    table.title = f"tokens/s over {settings.rounds} alternating rounds: median (least to most)"
    for s in speeds:
        cells = [_spread(s.tokens_per_second[name]) for name in MEASURES]
        table.add_row(s.program, f"{s.weight_bytes / 1e6:.0f}", *cells)
    Console().print(table)
    for name, reason in left_out.items():
        print(f"without {name}: {reason}")
    found = ratios(speeds)
    if not found:
        return
    table = Table("ours", "peer", "measure", "times as fast", "least", "most")
    for r in found:
        figures = [f"{x:.2f}" for x in (r.median, r.least, r.most)]
        table.add_row(r.ours, r.peer, titles[r.measure], *figures)
    Console().print(table)


def print_reading(speeds: list[Speeds], gigabytes_per_second: float) -> None:
    """Beside what reading the weights for each token allows one sequence."""
    table = Table("program", "reads GB/s", "at most tokens/s", "reached")
    table.title = f"all cores read {gigabytes_per_second:.1f} GB/s of more than caches hold"
    for s in speeds:
        rate = statistics.median(s.tokens_per_second[MEASURES[0]])
        most = gigabytes_per_second * 1e9 / s.weight_bytes
        reads = f"{rate * s.weight_bytes / 1e9:.1f}"
        table.add_row(s.program, reads, f"{most:.0f}", f"{rate / most:.0%}")
    Console().print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def as_json(speeds: list[Speeds], left_out: dict[str, str], settings: Settings) -> dict[str, Any]:
    """Everything that was measured; tokens per second by round."""
    return {
        "settings": vars(settings),
        "programs": [vars(s) for s in speeds],
        "ratios": [vars(r) for r in ratios(speeds)],
        "left_out": left_out,
    }
