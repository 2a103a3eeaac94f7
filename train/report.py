"""Pictures of a run: loss, and each expert's load over training; as PNG files and one HTML page."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from formats.small_files import read_json_object
from train.metrics import Line, read_lines

INK, SOFT, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#2f6f9f", "#d9822b"
COLUMNS = ("step", "loss", "cross_entropy", "tokens_per_second")
"""Of the log, that are drawn or told."""
OPTIONAL = ("validation_loss", "validation_bits_per_byte")
"""The same, where the run was measured."""
MAX_LAYERS = 8
"""Layers drawn in a heat map; of deeper models, as many spread over the depth."""
LABEL_HEIGHT = 0.07
"""Of a line of text, as a share of a panel's height."""


@dataclass(frozen=True)
class Picture:
    name: str
    """File name without ending."""
    caption: str
    png: bytes


def write_report(run_dir: Path, sections: Sequence[str] = ()) -> None:
    """Draws run_dir/loss.png, load.png (MoE only) and report.html from metrics.jsonl.

    Args:
      sections: HTML put under the run's own table.
    Raises:
      UserError: there is no metrics.jsonl, or it is damaged.
    """
    lines = read_lines(run_dir / "metrics.jsonl", COLUMNS, OPTIONAL)
    name = printable(run_dir.resolve().name)
    pictures, summary = [], {"steps": "none are in the log"}
    if lines:
        load = draw_load(lines)
        pictures = [draw_loss({name: lines}), *([load] if load else [])]
        speed = np.median([line["tokens_per_second"] for line in lines])
        summary = {
            "steps": f"{lines[-1]['step']:,}",
            "last loss": f"{lines[-1]['loss']:.4f}",
            "median tokens per second": f"{speed:,.0f}",
        } | _validation_metrics(lines)
    config = read_json_object(run_dir / "config.json", "restore it or start a new run")
    write_page(run_dir, f"Run {name}", [table(summary), *sections], pictures, config)


def draw_loss(runs: dict[str, list[Line]]) -> Picture:
    """Training loss of one or more runs, raw and smoothed."""
    figure, axes = new_figure(7.5, 3.6)
    ends: dict[str, tuple[float, float, str]] = {}
    for (name, lines), color in zip(runs.items(), (BLUE, ORANGE, INK), strict=False):
        steps, nats = _column(lines, "step"), _column(lines, "cross_entropy")
        smooth = smoothed(nats)
        axes.plot(steps, nats, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth, color=color, linewidth=1.8)
        _draw_validation(axes, lines, color)
        ends[f"{name} {smooth[-1]:.2f}"] = (steps[-1], smooth[-1], color)
    label_ends(axes, ends)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    caption = "Training loss; the bold line is its running mean."
    if any(_validated(lines) for lines in runs.values()):
        caption += " The circles are the loss on held-out text."
    return to_picture(figure, "loss", caption)


def label_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Labels right of the panel at the height of each line's end, apart from one another; a dotted
    line leads there from one that ends sooner.

    Args:
      ends: by label the step, the value and the colour.
    """
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    place = -math.inf
    for label, (step, value, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        place = max(value, place + LABEL_HEIGHT * (high - low))
        axes.plot([step, right], [value, value], ":", color=color, linewidth=0.8, scalex=False)
        axes.annotate(
            no_formula(label),
            (1, place),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
    axes.set_xlim(right=right)
    axes.set_ylim(low, high)


def _draw_validation(axes: Axes, lines: list[Line], color: str) -> None:
    """A circle for each measurement, in the colour of its run."""
    measured = _validated(lines)
    steps, nats = _column(measured, "step"), _column(measured, "validation_loss")
    axes.plot(steps, nats, "o", color=color, markerfacecolor="white", markersize=5)


def _validated(lines: list[Line]) -> list[Line]:
    return [line for line in lines if "validation_loss" in line]


def _validation_metrics(lines: list[Line]) -> dict[str, str]:
    """Rows of the report's table: the last measurement on held-out text."""
    for line in reversed(_validated(lines)):
        metrics = {"last validation loss": f"{line['validation_loss']:.4f}"}
        if "validation_bits_per_byte" in line:
            metrics["in bits per byte"] = f"{line['validation_bits_per_byte']:.4f}"
        return metrics
    return {}


def draw_validation(runs: dict[str, list[Line]]) -> Picture | None:
    """Validation loss of runs of one corpus; None where one of them was not measured."""
    measured = {name: _validated(lines) for name, lines in runs.items()}
    if not all(measured.values()):
        return None
    figure, axes = new_figure(7.5, 3.6)
    ends: dict[str, tuple[float, float, str]] = {}
    for (name, lines), color in zip(measured.items(), (BLUE, ORANGE, INK), strict=False):
        steps, nats = _column(lines, "step"), _column(lines, "validation_loss")
        axes.plot(steps, nats, "o-", color=color, linewidth=1.8, markersize=4)
        ends[f"{name} {nats[-1]:.2f}"] = (steps[-1], nats[-1], color)
    label_ends(axes, ends)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per token")
    caption = (
        "Loss on held-out text, the same rows for all, as training goes on. Where runs are of "
        "different lengths, only their ends compare: rates fall sooner in a short one."
    )
    return to_picture(figure, "validation_loss", caption)


def draw_load(lines: list[Line]) -> Picture | None:
    """Each expert's load over the mean, by layer and step; None where nothing was logged."""
    logged = [line for line in lines if "expert_load" in line]
    if not logged:
        return None
    by_layer = list(zip(*[line["expert_load"] for line in logged], strict=True))
    layers = np.unique(np.linspace(0, len(by_layer) - 1, MAX_LAYERS).round().astype(int))
    figure = Figure(figsize=(7.5, 0.6 + 1.1 * len(layers)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(layers), 1, sharex=True))
    steps = _column(logged, "step")
    image = None
    for panel, layer in zip(panels, layers, strict=True):
        load_ES = np.array(by_layer[layer]).T  # layers may have unequal numbers of experts
        image = panel.imshow(
            np.clip(load_ES, 1 / 4, 4),
            aspect="auto",
            extent=(steps[0], steps[-1] + 1e-9, len(load_ES) - 0.5, -0.5),
            cmap="RdBu_r",
            norm=LogNorm(1 / 4, 4),
            interpolation="nearest",
        )
        panel.set_ylabel(f"layer {layer}", color=INK)
        panel.tick_params(colors=SOFT, labelcolor=INK)
    panels[-1].set_xlabel("step", color=INK)
    assert image is not None
    bar = figure.colorbar(image, ax=panels.tolist(), label="load over the mean")
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["¼ or less", "½", "1", "2", "4 or more"])
    bar.ax.minorticks_off()
    caption = (
        "Load of each expert (a row) over training: white is an equal share, red more, blue less."
    )
    return to_picture(figure, "load", caption)


def draw_domains(layers: dict[str, np.ndarray], domains: list[str]) -> Picture:
    """How much each expert is a domain's own, NPMI [domains, E] by layer, as heat maps."""
    names = list(layers)
    places = np.unique(np.linspace(0, len(names) - 1, MAX_LAYERS).round().astype(int))
    height = 0.8 + len(places) * (0.5 + 0.22 * len(domains))
    figure = Figure(figsize=(7.5, height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(places), 1))
    limit = max(max(float(np.abs(layers[names[i]]).max()) for i in places), 0.1)
    image = None
    for panel, i in zip(panels, places, strict=True):
        image = panel.imshow(
            layers[names[i]],
            aspect="auto",
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        panel.set_title(no_formula(names[i]), color=INK, loc="left", fontsize=10)
        panel.set_yticks(range(len(domains)), [no_formula(name) for name in domains])
        panel.tick_params(colors=SOFT, labelcolor=INK)
    panels[-1].set_xlabel("expert", color=INK)
    assert image is not None
    figure.colorbar(image, ax=panels.tolist(), label="NPMI of expert and domain")
    caption = (
        "Which experts (columns) a domain's text (a row) chooses more often, red, or less often, "
        "blue, than all text does."
    )
    return to_picture(figure, "expert_domains", caption)


def draw_bars(
    name: str, caption: str, values: dict[str, float], errors: dict[str, float], unit: str
) -> Picture:
    """Labelled horizontal bars with their standard errors."""
    figure, axes = new_figure(7.5, 0.8 + 0.42 * len(values))
    names = list(values)
    places = np.arange(len(names))[::-1]
    colors = [BLUE if n in errors else SOFT for n in names]
    axes.barh(places, list(values.values()), color=colors, height=0.62)
    for place, label in zip(places, names, strict=True):
        error = errors.get(label)
        text = f" {values[label]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
        axes.text(values[label], place, text, va="center", color=INK)
    axes.set_yticks(places, [no_formula(name) for name in names])
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.2 * max(values.values()) or 1)
    axes.grid(axis="y", visible=False)
    return to_picture(figure, name, caption)


def printable(name: str) -> str:
    """A file's name as a page can hold it: bytes that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def no_formula(text: str) -> str:
    """A user's text as matplotlib shows it letter by letter: two "$" would begin a formula."""
    return printable(text).replace("$", r"\$")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over the last twentieth of the series, at least 1 value."""
    window = max(len(values) // 20, 1)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def table(rows: dict[str, str]) -> str:
    """An HTML table of names and values."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def columns_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table with a head."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def write_page(
    directory: Path,
    title: str,
    sections: list[str],
    pictures: list[Picture],
    details: dict[str, Any],
) -> Path:
    """Writes the pictures and report.html, which carries them inside and needs no other file.

    Args:
      sections: HTML put above the pictures.
      details: shown folded as JSON, such as the run's config.
    """
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.png)
    plots = "".join(
        f'<figure><img alt="{html.escape(p.caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(p.png).decode()}"><figcaption>{html.escape(p.caption)}</figcaption></figure>'
        for p in pictures
    )
    folded = html.escape(json.dumps(details, indent=2))
    page = directory / "report.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(sections)}{plots}"
        f"<details><summary>Settings</summary><pre>{folded}</pre></details></html>\n"
    )
    return page


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 50rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem 1rem .2rem 0; text-align: left;
       border-bottom: 1px solid #e4e7eb; } th { font-weight: 500; }
figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #616e7c; }
pre { background: #f5f7fa; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel in the house's style; sizes in inches."""
    figure, (axes,) = new_panels(width, height, 1)
    return figure, axes


def new_panels(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(SOFT)
        axes.tick_params(colors=SOFT, labelcolor=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, panels


def to_picture(figure: Figure, name: str, caption: str) -> Picture:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        figure.savefig(buffer, format="png", dpi=140)
    return Picture(name, caption, buffer.getvalue())


def _column(lines: list[Line], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines])
