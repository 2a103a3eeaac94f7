"""Findings and reports of an A/B experiment, printed and kept."""

import datetime
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import processor
from train.report import Picture


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the figure should reach."""

    limit: float
    stretch: float | None = None
    at_most: bool = False
    """Whether smaller is better; otherwise larger is."""

    def verdict(self, value: float) -> str:
        if self.stretch is not None and self._reaches(value, self.stretch):
            return "stretch reached"
        return "reached" if self._reaches(value, self.limit) else "MISSED"

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        stretch = "" if self.stretch is None else f" ({sign} {self.stretch:g})"
        return f"{sign} {self.limit:g}{stretch}"

    def _reaches(self, value: float, limit: float) -> bool:
        return value <= limit if self.at_most else value >= limit


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measured figure."""

    name: str
    values: tuple[float, ...]
    """One per seed, or per alternating round of a timing."""
    target: Target | None = None
    """Judged by the median."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def row(self) -> list[str]:
        """Name, median, mean and standard deviation, number of values, target, verdict."""
        is_finite = all(math.isfinite(value) for value in self.values)
        spread = statistics.stdev(self.values) if len(self.values) > 1 and is_finite else 0.0
        return [
            self.name,
            f"{self.median:.4g}",
            f"{statistics.mean(self.values):.4g} ± {spread:.2g}",
            str(len(self.values)),
            str(self.target or ""),
            self.target.verdict(self.median) if self.target else "",
        ]


COLUMNS = ("figure", "median", "mean ± sd", "n", "target (stretch)", "verdict")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One experiment, done."""

    title: str
    article: str
    """The article's figure, in its words."""
    bound: str
    """What theory allows at most, with its number."""
    setting: str
    """Data, steps, sizes, active FLOPs."""
    findings: Sequence[Finding]
    picture: Picture
    notes: Sequence[str] = ()
    """What the figures mean, and what did not come out."""

    @property
    def missed(self) -> list[str]:
        return [f.name for f in self.findings if f.target and "MISSED" in f.row()]


def print_report(report: Report) -> None:
    console = Console()
    console.print(f"[bold]{report.title}[/bold]")
    for label, text in _texts(report):
        console.print(f"{label}: {text}", highlight=False)
    table = Table(*COLUMNS)
    for finding in report.findings:
        table.add_row(*finding.row())
    console.print(table)
    for note in report.notes:
        console.print(f"- {note}", highlight=False)


def append_report(report: Report, path: Path, command: str, seconds: float) -> None:
    """Adds the experiment to the log of ablations as a section of Markdown."""
    today = datetime.date.today().isoformat()
    lines = ["", f"## {report.title} ({today})", "", f"    {command}", ""]
    lines += [f"{processor()}, {seconds / 60:.0f} min.", ""]
    lines += [f"- {label}: {text}" for label, text in _texts(report)]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(finding.row()) + " |" for finding in report.findings]
    lines += ["", *(f"- {note}" for note in report.notes)]
    with path.open("a") as file:
        file.write("\n".join(lines).rstrip() + "\n")


def _texts(report: Report) -> list[tuple[str, str]]:
    return [("Article", report.article), ("Bound", report.bound), ("Setting", report.setting)]
