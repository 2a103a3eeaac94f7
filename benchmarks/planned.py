"""What planning for this machine gives over defaults: the same requests by two engines, in turns.

For each shape (clients, tokens of a prompt, new tokens) one engine has scripts.serve's defaults and
the other what planning/inference.py chooses. A turn answers all clients' requests, which come at
once; ratios are taken within a round, and the geometric mean over the shapes of their medians.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from infer.engine import Engine, EngineOptions, Request
from infer.engine.options import with_pages
from infer.sources import Source
from infer.weights import check_format
from model.transformer import Transformer, Variables

DEFAULT_ROWS = 8
"""Of scripts.serve."""


@dataclass(frozen=True)
class Shape:
    """What clients ask for at once."""

    clients: int
    prompt: int
    new: int

    @property
    def length(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True)
class Planned:
    """How a shape's requests are to be served."""

    weights: str
    options: EngineOptions

    def __str__(self) -> str:
        o = self.options
        return f"{self.weights}, kv {o.kv_dtype}, {o.max_rows} row(s), pieces of {o.piece}"


SHAPES = (
    *(Shape(1, 32, 32), Shape(1, 512, 16), Shape(2, 64, 48), Shape(4, 32, 64)),
    *(Shape(4, 256, 16), Shape(8, 32, 32), Shape(8, 256, 16), Shape(16, 64, 16)),
)


@dataclass(frozen=True)
class Compared:
    """A shape's rates, round by round, and what was planned for it."""

    shape: Shape
    plan: str
    default: list[float]
    """New tokens per second of all clients."""
    planned: list[float]

    @property
    def ratio(self) -> float:
        """Times as fast as the default, the median over the rounds."""
        pairs = zip(self.planned, self.default, strict=True)
        return statistics.median(planned / default for planned, default in pairs)


def compare(
    source: Source,
    plan_for: Callable[[Shape], Planned],
    shapes: Sequence[Shape] = SHAPES,
    rounds: int = 3,
    on_shape: Callable[[int], None] = lambda done: None,
) -> list[Compared]:
    """Both engines on each shape.

    Args:
      plan_for: what is chosen for a shape.
      on_shape: called with the number of shapes that are done.
    Raises:
      UserError: of plan_for, or a shape is longer than the model's context.
    """
    loaded: dict[str, tuple[Transformer, Variables]] = {}

    def engine_of(plan: Planned) -> Engine:
        if plan.weights not in loaded:
            weights = check_format(plan.weights)
            loaded[plan.weights] = source.load(weights=weights, for_decoding=True)
        engine = Engine(*loaded[plan.weights], with_pages(plan.options, source.config))
        engine.warm_up()
        return engine

    found = []
    for done, shape in enumerate(shapes):
        plan = plan_for(shape)
        options = EngineOptions(max_rows=DEFAULT_ROWS, max_length=shape.length)
        arms = engine_of(Planned("float32", options)), engine_of(plan)
        rates = alternate(arms, shape, source.config.vocab_size, rounds)
        found.append(Compared(shape, str(plan), *rates))
        on_shape(done + 1)
    return found


def alternate(
    arms: Sequence[Engine], shape: Shape, vocab_size: int, rounds: int
) -> list[list[float]]:
    """New tokens per second of each engine, round by round; a round before them is not counted."""
    rates: list[list[float]] = [[] for _ in arms]
    for turn in range(rounds + 1):
        for engine, own in zip(arms, rates, strict=True):
            rate = answered(engine, shape, vocab_size, seed=turn)
            own += [rate] * (turn > 0)
    return rates


def answered(engine: Engine, shape: Shape, vocab_size: int, seed: int) -> float:
    """New tokens per second while all clients are answered."""
    rng = np.random.default_rng(seed)
    for _ in range(shape.clients):
        engine.add(Request(rng.integers(1, vocab_size, shape.prompt).tolist(), shape.new))
    began, given = time.perf_counter(), 0
    while engine.has_work():
        given += sum(len(emitted.tokens) for emitted in engine.step())
    assert given == shape.clients * shape.new
    return given / (time.perf_counter() - began)


def geometric_mean(found: Sequence[Compared]) -> float:
    """Of the shapes' ratios."""
    return math.exp(statistics.fmean(math.log(one.ratio) for one in found))


def table_of(found: Sequence[Compared]) -> Table:
    """For the terminal."""
    table = Table(
        "clients", "prompt", "new", "planned", "default, tokens/s", "planned, tokens/s", "times"
    )
    for one in found:
        shape = one.shape
        rates = [f"{statistics.median(x):,.1f}" for x in (one.default, one.planned)]
        sizes = (f"{shape.clients}", f"{shape.prompt}", f"{shape.new}")
        table.add_row(*sizes, one.plan, *rates, f"{one.ratio:.2f}")
    table.caption = f"geometric mean {geometric_mean(found):.2f}; medians of alternating rounds"
    return table
