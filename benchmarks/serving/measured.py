"""What a load came to: throughput and percentiles, as a table, a picture and numbers to keep."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.serving.load import Answer


@dataclass(frozen=True)
class Measured:
    """One turn of one server."""

    requests: int
    failed: int
    seconds: float
    """From the first request to the last answer."""
    tokens: int
    """Of all answers."""
    tokens_per_second: float
    first_token_p50: float
    """In seconds, as all that follow; NaN where nothing was answered."""
    first_token_p99: float
    between_p50: float
    between_p99: float


def measure(answers: Sequence[Answer], seconds: float) -> Measured:
    """A turn's figures; answers that failed count as such alone."""
    good = [a for a in answers if a.error is None]
    first = [a.first_token for a in good if not math.isnan(a.first_token)]
    gaps = [gap for a in good for gap in a.gaps]
    tokens = sum(a.tokens for a in good)
    return Measured(
        len(answers),
        len(answers) - len(good),
        seconds,
        tokens,
        tokens / seconds,
        *(percentile(values, q) for values in (first, gaps) for q in (50, 99)),
    )


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else math.nan


COLUMNS = {
    "tokens_per_second": ("tokens/s", 1.0, ".1f"),
    "first_token_p50": ("first token P50, ms", 1e3, ".0f"),
    "first_token_p99": ("P99", 1e3, ".0f"),
    "between_p50": ("between tokens P50, ms", 1e3, ".1f"),
    "between_p99": ("P99", 1e3, ".1f"),
}
"""Title, factor and form by figure."""


def middle(turns: Sequence[Measured], name: str) -> float:
    """The median over turns."""
    return statistics.median(getattr(turn, name) for turn in turns)


def ratios(
    turns: Sequence[Measured], base: Sequence[Measured], name: str = "tokens_per_second"
) -> list[float]:
    """Round by round: machines change their speed, and only turns of one round are comparable."""
    pairs = zip(turns, base, strict=True)
    return [getattr(a, name) / getattr(b, name) for a, b in pairs if getattr(b, name)]


def print_turns(found: Mapping[str, Sequence[Measured]], title: str) -> None:
    """A row for each server: medians over the rounds, and its throughput beside the first's."""
    columns = [column[0] for column in COLUMNS.values()]
    table = Table("", *columns, "failed", "throughput", title=title, title_justify="left")
    base = next(iter(found.values()))
    for name, turns in found.items():
        shown = [format(middle(turns, c) * f, form) for c, (_, f, form) in COLUMNS.items()]
        failed = f"{sum(t.failed for t in turns)}/{sum(t.requests for t in turns)}"
        of_first = ratios(turns, base)
        spread = f"{min(of_first):.2f}-{max(of_first):.2f}" if of_first else "-"
        ratio = f"{statistics.median(of_first):.2f}x ({spread})" if of_first else "-"
        table.add_row(name, *shown, failed, ratio)
    Console().print(table)


def as_json(found: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Every turn by server; figures that there are not are null."""

    def shown(value: float) -> float | None:
        return None if isinstance(value, float) and math.isnan(value) else value

    return {
        name: [{k: shown(v) for k, v in asdict(turn).items()} for turn in turns]
        for name, turns in found.items()
    }


def draw(found: Mapping[str, Sequence[Measured]], path: Path) -> None:
    """Throughput, time to the first token and between tokens of each server, as bars (PNG)."""
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(found)), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    panels = (("tokens_per_second",), ("first_token_p50", "first_token_p99"))
    panels += (("between_p50", "between_p99"),)
    names = list(found)
    for axis, columns in zip(axes, panels, strict=True):
        for i, column in enumerate(columns):
            values = [middle(found[name], column) * COLUMNS[column][1] for name in names]
            height = 0.8 / len(columns)
            places = [place + (i - (len(columns) - 1) / 2) * height for place in range(len(names))]
            axis.barh(places, values, height=height, color=f"C{i}", label=COLUMNS[column][0])
        axis.set_title(COLUMNS[columns[0]][0].replace(" P50", ""))
        axis.set_yticks(range(len(names)), names)
        if len(columns) > 1:
            axis.legend(["P50", "P99"])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
