"""The articles' figures of serving, on SmolLM2 by the engine: continuous and dynamic batching, a
layered cache of prefixes, weights in 8 and 4 bits.

Each arm is an engine of its own; they take turns on the same requests, and ratios are taken within
a round. What a server adds, `python -m scripts.bench_serving` measures over HTTP.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import ratio
from benchmarks.serving.load import draw_lengths
from infer.engine import Engine, EngineOptions, Request
from infer.engine.options import with_pages
from infer.sources import open_source
from infer.weights import WeightFormat, num_bytes
from model.transformer import Transformer, Variables
from train.progress import ProgressBar
from train.report import BLUE, SOFT, Picture, new_figure, to_picture

REQUESTS, PROMPT, ANSWER, LONGEST = 24, 60.0, 80.0, 512
"""Of a turn: their number, tokens on average, and of prompt and answer together at most."""
ROWS = 8
LATENCY = 0.1
"""Seconds between two tokens of a text, that dynamic batching is to keep."""
REPEATED, AGAIN = 1024, 16
"""Tokens of a prompt that is asked again, and of its answer."""
ALONE = 48
"""Tokens of a text whose seconds a token are measured."""
FORMATS: tuple[WeightFormat, ...] = ("float32", "int8", "int4")
Values = dict[str, list[float]]
Loaded = dict[str, tuple[Transformer, Variables]]


@dataclass(frozen=True)
class Turn:
    """What an engine made of a load."""

    tokens_per_second: float
    gaps: np.ndarray
    """Seconds between two tokens of one text, of all texts."""


def run(seeds: int) -> Report:
    source = open_source("smollm2")
    loaded: Loaded = {name: source.load(weights=name, for_decoding=True) for name in FORMATS}
    values: Values = {}
    parts = [_batching, _formats, _repeated]
    with ProgressBar("serving", total=seeds * len(parts), unit="parts") as bar:
        for part in parts:
            for seed, found in enumerate(part(loaded, seeds)):
                for name, value in found.items():
                    values.setdefault(name, []).append(value)
                bar.update(parts.index(part) * seeds + seed + 1)
    sizes = {name: float(num_bytes(variables)) for name, (_, variables) in loaded.items()}
    return Report(
        title="serving: batching, a cache of prefixes and few bits",
        article="continuous batching gives 40% more tokens; dynamic batching 2.8 times under 100 "
        "ms; layered caching answers what is asked again 5.7 times sooner; INT8 has 2.3 times the "
        "throughput in 60% less memory; INT4 is an eighth in size, with 72% less latency",
        bound="weights of int8 are read in 0.27 of float32's time and of int4 in 0.17, scales and "
        "embedding with them: 3.8 and 6 times the tokens at most where reading is what takes long; "
        "static batching wastes the rows whose answers have ended",
        setting=f"SmolLM2-135M, {REQUESTS} requests at once for {ROWS} rows, log-normal lengths "
        f"with means of {PROMPT:g} and {ANSWER:g} tokens; asked again: a prompt of {REPEATED:,} "
        f"tokens with an answer of {AGAIN}; {seeds} alternating rounds",
        findings=findings_of(values, sizes),
        picture=_draw(values),
        notes=[
            "The articles don't say what their gains are beside: dynamic batching is held against "
            "one request at a time.",
        ],
    )


def engine_of(model: Transformer, variables: Variables, **options: Any) -> Engine:
    made = EngineOptions(max_length=LONGEST, **options)
    engine = Engine(model, variables, with_pages(made, model.config))
    engine.warm_up()
    return engine


def requests_of(vocab_size: int, seed: int) -> list[Request]:
    """A load: prompts of drawn tokens, answers of drawn lengths."""
    draw = np.random.default_rng(seed)
    size = {"prompt_mean": PROMPT, "answer_mean": ANSWER, "longest": LONGEST - 1}
    lengths = draw_lengths(REQUESTS, seed, **size)
    return [Request(draw.integers(1, vocab_size, p).tolist(), a) for p, a in lengths]


def answered(engine: Engine, requests: Sequence[Request]) -> Turn:
    """All of them from the first step on, until the last has its answer."""
    for request in requests:
        engine.add(request)
    began = time.perf_counter()
    last: dict[int, float] = {}
    gaps: list[float] = []
    count = 0
    while engine.has_work():
        emitted = engine.step()
        now = time.perf_counter()
        for one in emitted:
            count += len(one.tokens)
            if one.tokens and one.request in last:
                gaps.append(now - last[one.request])
            last[one.request] = now
    return Turn(count / (time.perf_counter() - began), np.array(gaps))


def _batching(loaded: Loaded, rounds: int) -> Iterator[dict[str, float]]:
    """Rows that are filled at once, rows that wait for each other, one row."""
    given = loaded["int8"]
    arms = {
        "continuous": engine_of(*given, max_rows=ROWS),
        "static": engine_of(*given, max_rows=ROWS, batching="static"),
        "dynamic": engine_of(*given, max_rows=ROWS, target_seconds=LATENCY),
        "one at a time": engine_of(*given, max_rows=1),
    }
    for seed in range(-1, rounds):
        requests = requests_of(given[0].config.vocab_size, seed + 1)
        found = {}
        for name, engine in arms.items():
            turn = answered(engine, requests[: 2 * ROWS] if seed < 0 else requests)
            found[f"{name}: tokens/s"] = turn.tokens_per_second
            found[f"{name}: P99 between tokens, ms"] = 1e3 * float(np.quantile(turn.gaps, 0.99))
        if seed >= 0:
            yield found


def _formats(loaded: Loaded, rounds: int) -> Iterator[dict[str, float]]:
    """A load, and a text alone, by the format of the weights."""
    arms = {
        name: [engine_of(*given, max_rows=rows) for rows in (ROWS, 1)]
        for name, given in loaded.items()
    }
    vocab_size = loaded["int8"][0].config.vocab_size
    for seed in range(-1, rounds):
        requests = requests_of(vocab_size, seed + 1)
        found = {}
        for name, (many, one) in arms.items():
            turn = answered(many, requests[: 2 * ROWS] if seed < 0 else requests)
            alone = answered(one, [dataclasses.replace(requests[0], max_new_tokens=ALONE)])
            found[f"{name}: tokens/s of {ROWS} rows"] = turn.tokens_per_second
            found[f"{name}: ms a token, alone"] = 1e3 * float(np.median(alone.gaps))
        if seed >= 0:
            yield found


def _repeated(loaded: Loaded, rounds: int) -> Iterator[dict[str, float]]:
    """A question that is read, that is asked again, and that an earlier process was asked."""
    given, length = loaded["int8"], REPEATED + AGAIN
    model = given[0]
    options = EngineOptions(max_rows=1, max_length=length, num_pages=2 + 4 * length // 64)
    with tempfile.TemporaryDirectory() as folder:
        kept = dataclasses.replace(options, prefix_cache=True, cache_dir=str(Path(folder)))
        draw = np.random.default_rng(0)
        for seed in range(-1, rounds):
            prompt = draw.integers(1, model.config.vocab_size, REPEATED).tolist()
            request = Request(prompt, AGAIN)
            found = {}
            plain, memory = Engine(*given, options), Engine(*given, kept)
            plain.warm_up()
            memory.warm_up()
            seconds_of(memory, request)
            found["read: seconds"] = seconds_of(plain, request)
            found["from memory: seconds"] = seconds_of(memory, request)
            disk = Engine(*given, kept)
            disk.warm_up()
            found["from disk: seconds"] = seconds_of(disk, request)
            if seed >= 0:
                yield found


def seconds_of(engine: Engine, request: Request) -> float:
    """Until the whole answer is there."""
    began = time.perf_counter()
    answered(engine, [request])
    return time.perf_counter() - began


def findings_of(values: Values, sizes: dict[str, float]) -> list[Finding]:
    def of(name: str, ours: str, base: str, target: Target) -> Finding:
        return ratio(name, values[ours], values[base], target)

    gap = "dynamic: P99 between tokens, ms"
    many, alone = f"tokens/s of {ROWS} rows", "ms a token, alone"
    at_most = {
        "int8's bytes over float32's": (sizes["int8"], Target(limit=0.4, at_most=True)),
        "int4's bytes over float32's": (sizes["int4"], Target(limit=0.125, at_most=True)),
    }
    return [
        of(
            "tokens/s, continuous over static batching",
            "continuous: tokens/s",
            "static: tokens/s",
            Target(limit=1.4, stretch=4.0),
        ),
        of(
            "tokens/s, dynamic batching over one at a time",
            "dynamic: tokens/s",
            "one at a time: tokens/s",
            Target(limit=2.8),
        ),
        Finding(
            name=gap, values=tuple(values[gap]), target=Target(limit=1e3 * LATENCY, at_most=True)
        ),
        of(
            "seconds, read over asked again",
            "read: seconds",
            "from memory: seconds",
            Target(limit=5.7),
        ),
        of(
            "seconds, read over known on disk alone",
            "read: seconds",
            "from disk: seconds",
            Target(limit=5.7),
        ),
        of(f"{many}, int8 over float32", f"int8: {many}", f"float32: {many}", Target(limit=2.3)),
        of(
            f"{alone}: int4 over float32",
            f"int4: {alone}",
            f"float32: {alone}",
            Target(limit=0.28, at_most=True),
        ),
        *(
            Finding(name=name, values=(size / sizes["float32"],), target=target)
            for name, (size, target) in at_most.items()
        ),
        *(Finding(name=name, values=tuple(found)) for name, found in values.items() if name != gap),
    ]


def _draw(values: Values) -> Picture:
    """Tokens per second of every arm, a point per round."""
    names = [name for name in values if "tokens/s" in name]
    figure, axes = new_figure(7.5, 0.4 * len(names) + 0.8)
    for place, name in enumerate(reversed(names)):
        axes.plot(values[name], np.full(len(values[name]), place), "o", color=BLUE, alpha=0.7)
    axes.axvline(0.0, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("tokens/s, a point per round")
    return to_picture(figure, "serving", "How many tokens a second each arm answers.")
