"""Runs side by side: curves in one picture, what their configs differ in, what they came to."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from checkpoint.run_directory import read_run
from configs.base import RunConfig
from configs.checks import require
from configs.near_names import setting_names
from train.metrics import Line, read_lines
from train.report import (
    COLUMNS,
    INK,
    OPTIONAL,
    SOFT,
    Picture,
    no_formula,
    printable,
    smoothed,
    to_picture,
    write_page,
)

COLORS = (
    *("#2f6f9f", "#d9822b", "#3c8d5a", "#b3446c", "#6b5ca5", "#8a6d3b", "#1f9aa8", "#7b8794"),
)
"""Of the first eight runs; further ones have them again, dashed and then dotted."""
STYLES = ("-", "--", ":")
MAX_RUNS = len(COLORS) * len(STYLES)
ABSENT = "-"


@dataclass(frozen=True)
class ComparedRun:
    """A run that has trained."""

    name: str
    config: RunConfig
    lines: list[Line]

    @property
    def validated(self) -> list[Line]:
        return [line for line in self.lines if "validation_loss" in line]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders, by names that tell them apart.

    Raises:
      UserError: a folder that is no run or has no step in its log, or too many.
    """
    require(
        len(folders) <= MAX_RUNS,
        f"{len(folders)} runs are too many for one picture, at most {MAX_RUNS} are told apart: "
        "compare some of them",
    )
    runs = []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        lines = read_lines(folder / "metrics.jsonl", COLUMNS, OPTIONAL)
        require(bool(lines), f"{folder} has no step in its metrics.jsonl: train it first")
        runs.append(ComparedRun(name, read_run(folder), lines))
    return runs


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    Raises:
      UserError: one of them twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    require(
        len(set(parts)) == len(parts),
        f"{', '.join(map(str, folders))} name a run twice: name each once",
    )
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return [printable(name) for name in names]
    raise AssertionError("they differ")


def config_differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The settings whose values are not all the same, each with the value of every run; "-" where a
    run has no such setting. The name of a run is none.
    """
    settings = [
        {name.removeprefix("--"): repr(value) for name, value in setting_names(run.config)}
        for run in runs
    ]
    names = dict.fromkeys(name for own in settings for name in own)
    found = {name: [own.get(name, ABSENT) for own in settings] for name in names}
    return {k: v for k, v in found.items() if len(set(v)) > 1 and k != "name"}


def last_numbers(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Rows of a table: what each run came to."""

    def last(run: ComparedRun, name: str) -> str:
        values = [line[name] for line in run.lines if name in line]
        return f"{values[-1]:.4f}" if values else ABSENT

    return {
        "steps": [f"{run.lines[-1]['step']:,}" for run in runs],
        "parameters, M": [f"{run.config.model.num_parameters / 1e6:.2f}" for run in runs],
        "loss, mean of the last twentieth": [f"{last_loss(run):.4f}" for run in runs],
        "validation loss": [last(run, "validation_loss") for run in runs],
        "validation bits per byte": [last(run, "validation_bits_per_byte") for run in runs],
        "tokens per second, median": [
            f"{np.median([line['tokens_per_second'] for line in run.lines]):,.0f}" for run in runs
        ],
    }


def last_loss(run: ComparedRun) -> float:
    """Its cross-entropy, the mean of the last twentieth of its steps."""
    return float(smoothed(np.array([line["cross_entropy"] for line in run.lines]))[-1])


def draw_curves(runs: Sequence[ComparedRun]) -> Picture:
    """Loss, validation loss, load and throughput of the runs over their steps."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    loss, validation, load, speed = figure.subplots(2, 2).ravel()
    for i, run in enumerate(runs):
        look: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "linestyle": STYLES[i // len(COLORS)],
        }
        _draw(loss, run.lines, "cross_entropy", smooth=True, **look)
        _draw(validation, run.validated, "validation_loss", marker="o", **look)
        balanced = [
            {"step": line["step"], "load_cv": float(np.mean(line["load_cv"]))}
            for line in run.lines
            if "load_cv" in line
        ]
        _draw(load, balanced, "load_cv", smooth=True, **look)
        _draw(speed, run.lines, "tokens_per_second", smooth=True, **look)
    titles = (
        (loss, "training loss, nats per token (running mean)"),
        (validation, "validation loss, nats per token"),
        (load, "load of experts: CV, mean of the layers"),
        (speed, "tokens per second (running mean)"),
    )
    for axes, title in titles:
        _dress(axes, title)
    for axes in (load, speed):
        top = axes.dataLim.ymax
        axes.set_ylim(0, 1.1 * top if np.isfinite(top) and top > 0 else 1)
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], linestyle=STYLES[i // len(COLORS)])
        for i in range(len(runs))
    ]
    names = [no_formula(run.name) for run in runs]
    columns = min(len(runs), 4)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return to_picture(figure, "curves", "The runs over their steps.")


def _draw(
    axes: Axes, lines: Sequence[Line], name: str, *, smooth: bool = False, marker: str = "", **look
) -> None:
    if not lines:
        return
    values = np.array([line[name] for line in lines], np.float64)
    steps = [line["step"] for line in lines]
    shown = smoothed(values) if smooth else values
    axes.plot(steps, shown, marker=marker, markersize=4, linewidth=1.6, **look)


def _dress(axes: Axes, title: str) -> None:
    """The house's style; an empty panel says so."""
    axes.set_title(title, color=INK, loc="left", fontsize=10)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=INK)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not axes.lines:
        place = {"ha": "center", "va": "center", "transform": axes.transAxes, "color": SOFT}
        axes.text(0.5, 0.5, "not in the logs", **place)


def grid(names: Sequence[str], rows: dict[str, list[str]]) -> str:
    """An HTML table with a column for each run."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{html.escape(title)}</th>"
        + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for title, values in rows.items()
    )
    return f'<div style="overflow-x: auto"><table><tr>{head}</tr>{body}</table></div>'


def as_text(names: Sequence[str], rows: dict[str, list[str]]) -> str:
    """The same for a terminal."""
    lines = [["", *names], *([title, *values] for title, values in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def write_comparison(
    directory: Path,
    title: str,
    runs: Sequence[ComparedRun],
    pictures: Sequence[Picture] = (),
    sections: Sequence[str] = (),
) -> Path:
    """Writes curves.png and report.html: numbers, pictures, and the settings that differ.

    Args:
      pictures: further ones, shown first.
      sections: HTML between the numbers and the settings.
    """
    names = [run.name for run in runs]
    changed = config_differences(runs)
    settings = grid(names, changed) if changed else "<p>Their settings are the same.</p>"
    all_sections = [
        grid(names, last_numbers(runs)),
        *sections,
        f"<h2>Settings that differ</h2>{settings}",
    ]
    details = {run.name: dict(_plain_settings(run)) for run in runs}
    directory.mkdir(parents=True, exist_ok=True)
    drawn = [*pictures, draw_curves(runs)]
    return write_page(directory, title, all_sections, drawn, details)


def _plain_settings(run: ComparedRun) -> list[tuple[str, str]]:
    return [(name.removeprefix("--"), repr(value)) for name, value in setting_names(run.config)]
