"""What a load came to: throughput and percentiles, as a table, a picture and numbers to keep."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.serving.load import Answer
from train.report import BLUE, ORANGE, new_panels, to_picture


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
    "first_token_p50": ("first, ms", 1e3, ".0f"),
    "first_token_p99": ("P99", 1e3, ".0f"),
    "between_p50": ("next, ms", 1e3, ".1f"),
    "between_p99": ("P99", 1e3, ".1f"),
}
"""Title, factor and form by figure; medians, and 99th percentiles beside them. Short titles, for a
terminal of 80 columns."""
PANELS = {
    "tokens per second": ("tokens_per_second",),
    "to the first token, ms": ("first_token_p50", "first_token_p99"),
    "between two tokens, ms": ("between_p50", "between_p99"),
}


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
    title += "; ratio: of tokens/s, to the first row's"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, pad_edge=False)
    for column in ("", *columns, "failed", "ratio"):
        table.add_column(column, no_wrap=True)
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
    figure, axes = new_panels(10, 1.2 + 0.55 * len(found), len(PANELS))
    names = list(found)
    for axis, (title, columns) in zip(axes, PANELS.items(), strict=True):
        for i, column in enumerate(columns):
            _, factor, form = COLUMNS[column]
            values = [middle(found[name], column) * factor for name in names]
            height = 0.8 / len(columns)
            places = [place + (i - (len(columns) - 1) / 2) * height for place in range(len(names))]
            bars = axis.barh(places, values, height=height, color=(BLUE, ORANGE)[i])
            percentile_shown = f" P{column[-2:]}" if len(columns) > 1 else ""
            axis.bar_label(bars, [f"{v:{form}}{percentile_shown}" for v in values], padding=3)
        axis.set_xlabel(title)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.margins(x=0.3)
        axis.invert_yaxis()
    path.write_bytes(to_picture(figure, "serving", "").png)
