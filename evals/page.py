"""Results for people: tables on the terminal, and a page with pictures that needs no other file."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evals.aggregation import Score
from evals.comparison import LEVEL, Difference
from evals.results import Result
from evals.results_form import GroupScores, TaskScores
from evals.samples import Metric
from train.compare import COLORS
from train.report import (
    BLUE,
    INK,
    ORANGE,
    SOFT,
    Picture,
    columns_table,
    new_figure,
    no_formula,
    to_picture,
    write_page,
)

NO_BREAK = "\u00a0"
"""A space at which no line ends."""
MOST_GROUPS = 20
"""Groups shown of a task; results.json has all."""


def metric_name(metric: Metric) -> str:
    """As tables name it: with its filter where it has one."""
    return metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"


def shown_score(score: Score) -> str:
    """Value and standard error, and over several draws their standard deviation."""
    text = f"{score.value:.4f}"
    if score.standard_error is not None:
        text += f" ± {score.standard_error:.4f}"
    if score.deviation is not None:
        text += f"; {score.deviation:.4f} over {len(score.draws)} draws"
    return text


def rows_of(found: TaskScores) -> list[tuple[str, ...]]:
    """Rows of a table (COLUMNS): a task's metrics, and the first metric of each group."""
    rows = _rows(found.task.name, found.total)
    for group, scores in list(found.groups.items())[:MOST_GROUPS]:
        rows += _rows(f"  {group}", scores)[:1]
    return rows


def _rows(name: str, scores: GroupScores) -> list[tuple[str, ...]]:
    rates = (scores.empty_rate, scores.truncated_rate)
    shown = ["" if rate is None else f"{rate:.1%}" for rate in rates]
    rows: list[tuple[str, ...]] = []
    for metric, score in scores.scores.items():
        row = (name, metric_name(metric), shown_score(score), str(scores.count), *shown)
        rows.append(("", *row[1:3], "", "", "") if rows else row)
    return rows


COLUMNS = ("task", "metric", "value", "samples", "empty", "cut off")


def print_scores(title: str, found: TaskScores) -> None:
    """A task's scores, its groups', baselines, and how fast it went."""
    table = Table(title=f"{found.task.name} of {title}", box=SIMPLE_HEAD)
    for name in COLUMNS[:4]:
        table.add_column(name, no_wrap=name in ("value", "metric"))
    for row in rows_of(found):
        table.add_row(*row[:4])
    console = Console()
    console.print(table)
    print(f"  {description_of(found)}")
    if found.total.empty_rate is not None:
        print(
            f"  answers: {found.total.empty_rate:.1%} empty, {found.total.truncated_rate:.1%} cut "
            "off before their end"
        )
    if found.baselines:
        print("  beside it: " + ", ".join(f"{k} {v:.5g}" for k, v in found.baselines.items()))
    if found.total.cut_rate:
        print(
            f"  {found.total.cut_rate:.1%} of the samples are longer than the model's context and "
            "were cut on the left"
        )
    if found.num_asked:
        rate = found.num_asked / max(found.seconds, 1e-9)
        print(f"  {found.num_asked} samples in {found.seconds:.1f} s: {rate:.3g} samples/s")
    print(flush=True)


def description_of(found: TaskScores) -> str:
    """Version, data and settings behind a score."""
    shots = f", {found.num_fewshot}-shot" if found.num_fewshot else ""
    draws = f", {found.num_draws} draws of examples" if found.num_draws > 1 else ""
    chat = ", chat template" if found.uses_chat_template else ""
    return f"version {found.task.version}, data {found.data_sha256[:8]}{shots}{draws}{chat}"


def print_results(title: str, results: Iterable[Result]) -> None:
    """Each task's first metric with what lies beside it."""
    table = Table("task", "value", "of", "beside it", title=title)
    for r in results:
        value = f"{r.value:.4f} ± {r.standard_error:.4f} {r.unit}"
        beside = "\n".join(f"{k} {v:.3f}" for k, v in r.details.items() if isinstance(v, float))
        table.add_row(r.task, value, str(r.count), beside)
    Console().print(table)


def print_differences(first: str, second: str, differences: Sequence[Difference]) -> None:
    """The paired comparison of two models."""
    table = Table(title=f"{first} against {second}, sample by sample", box=SIMPLE_HEAD)
    for name in SHORT_COLUMNS:
        table.add_column(name, no_wrap=name != SHORT_COLUMNS[0])
    for d in differences:
        if not _is_perplexity(d.metric):
            p = "" if d.p_value is None else f"{d.p_value:.2g}"
            numbers = (f"{d.value:.3f}", f"{d.against:.3f}", f"{d.difference:+.3f}")
            interval = f"{d.low:+.3f} {d.high:+.3f}"
            table.add_row(_bar_name(d.task, d.metric), *numbers, interval, p)
    Console().print(table)


SHORT_COLUMNS = ("", "value", "against", "differ by", f"{LEVEL:.0%} interval", "McNemar p")
DIFFERENCE_COLUMNS = (
    *("task", "metric", "value", "against", "difference", f"{LEVEL:.0%} interval", "samples"),
    "McNemar p",
)


def _difference_row(found: Difference) -> tuple[str, ...]:
    p = "" if found.p_value is None else f"{found.p_value:.2g}"
    if found.p_value is not None:
        p += f" ({found.only_first}:{found.only_second})"
    return (
        found.task,
        metric_name(found.metric),
        f"{found.value:.4f}",
        f"{found.against:.4f}",
        f"{found.difference:+.4f}",
        f"{found.low:+.4f} to {found.high:+.4f}",
        str(found.count),
        p,
    )


# --- The page -------------------------------------------------------------------------------------


def write_scores_page(folder: Path, name: str, tasks: Sequence[TaskScores]) -> Path:
    """report.html of one model, and its pictures."""
    rows = [(*row, "") for found in tasks for row in rows_of(found)]
    firsts = np.cumsum([0, *(len(rows_of(found)) for found in tasks)])
    for first, found in zip(firsts, tasks, strict=False):
        rows[first] = (*rows[first][:-1], description_of(found))
    section = columns_table((*COLUMNS, "of"), rows)
    details = {found.task.name: found.task.description for found in tasks}
    return write_page(folder, f"Scores of {name}", [section], draw_scores({"": tasks}), details)


def difference_table(differences: Sequence[Difference]) -> str:
    """HTML of a paired comparison."""
    return columns_table(DIFFERENCE_COLUMNS, [_difference_row(found) for found in differences])


def write_overview_page(
    folder: Path,
    models: Mapping[str, Sequence[TaskScores]],
    left_out: Mapping[str, Sequence[str]],
) -> Path:
    """report.html of several models side by side, and its pictures.

    Args:
      left_out: of each model the sentences that say what was not asked, and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, tasks in models.items():
        for found in tasks:
            for metric, score in found.total.scores.items():
                key = (found.task.name, metric_name(metric))
                cells.setdefault(key, {})[name] = _cell(score, found.total)
    rows = [(*key, *(row.get(name, "") for name in models)) for key, row in cells.items()]
    sections = [columns_table(("task", "metric", *models), rows)]
    for name, sentences in left_out.items():
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        sections.append(f"<p>Not asked of {html.escape(name)}:</p><ul>{items}</ul>")
    title, about = "Scores side by side", {f.task.name: f.task.description for f in _each(models)}
    return write_page(folder, title, sections, draw_scores(models), about)


def _cell(score: Score, of: GroupScores) -> str:
    """A score with its samples, and how many answers were empty or cut off where any was; lines
    break between these alone.
    """
    parts = [f"{shown_score(score)} ({of.count})"]
    for rate, what in ((of.empty_rate, "empty"), (of.truncated_rate, "cut off")):
        parts += [f"{rate:.0%} {what}"] if rate else []
    return "; ".join(part.replace(" ", NO_BREAK) for part in parts)


def _each(models: Mapping[str, Sequence[TaskScores]]) -> Iterable[TaskScores]:
    return (found for tasks in models.values() for found in tasks)


def write_comparison_page(
    folder: Path, first: str, second: str, differences: Sequence[Difference]
) -> Path:
    """comparison/report.html of two models, and its pictures."""
    place = folder / "comparison"
    place.mkdir(parents=True, exist_ok=True)
    sections = [
        f"<p>Both models answered the same samples. The interval is of the difference, over "
        f"samples drawn again; the McNemar test compares the samples that one model alone has "
        f"right ({html.escape(first)} : {html.escape(second)}).</p>",
        difference_table(differences),
    ]
    pictures = [draw_differences(first, second, differences)]
    pictures += _draw_sides(first, second, differences)
    details = {"model": first, "against": second}
    return write_page(place, f"{first} against {second}", sections, pictures, details)


def draw_scores(models: Mapping[str, Sequence[TaskScores]]) -> list[Picture]:
    """Shares (accuracies) of each model in one picture, bits per byte in another.

    Args:
      models: what was found of each, by its name; an empty name is not shown.
    """
    pictures = []
    for name, unit, wants_bits in (
        ("shares", "share of samples", False),
        ("bits_per_byte", "bits per byte", True),
    ):
        sides = {
            model: {
                _bar_name(found.task.name, metric): score
                for found in tasks
                for metric, score in found.total.scores.items()
                if (metric.name == "bits_per_byte") == wants_bits and not _is_perplexity(metric)
            }
            for model, tasks in models.items()
        }
        if any(sides.values()):
            better = "fewer are better" if wants_bits else "more is better"
            caption = f"Scores with their standard errors; {better}."
            pictures.append(_draw_bars(name, caption, sides, unit))
    return pictures


def _draw_sides(first: str, second: str, differences: Sequence[Difference]) -> list[Picture]:
    pictures = []
    for name, unit, wants_bits in (
        ("shares", "share of samples", False),
        ("bits_per_byte", "bits per byte", True),
    ):
        chosen = [
            d
            for d in differences
            if (d.metric.name == "bits_per_byte") == wants_bits and not _is_perplexity(d.metric)
        ]
        sides = {
            first: {_bar_name(d.task, d.metric): Score(d.value, None) for d in chosen},
            second: {_bar_name(d.task, d.metric): Score(d.against, None) for d in chosen},
        }
        if chosen:
            caption = f"The two models' scores ({unit})."
            pictures.append(_draw_bars(name, caption, sides, unit))
    return pictures


def draw_differences(first: str, second: str, differences: Sequence[Difference]) -> Picture:
    """Each difference with its interval, in units of the larger of the two scores; 0 is a line."""
    shown = [d for d in differences if not _is_perplexity(d.metric)]
    figure, axes = new_figure(7.5, 1.0 + 0.36 * max(len(shown), 1))
    places = np.arange(len(shown))[::-1]
    for place, d in zip(places, shown, strict=True):
        sign = 1 if d.metric.higher_is_better else -1
        color = SOFT if not d.is_clear else (BLUE if sign * d.difference > 0 else ORANGE)
        ends = sorted((sign * d.low, sign * d.high))
        axes.plot(ends, [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot([sign * d.difference], [place], "o", color=color, markersize=6)
        axes.annotate(
            f" {sign * d.difference:+.3f}",
            (max(*ends, sign * d.difference), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(places, [no_formula(_bar_name(d.task, d.metric)) for d in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("better by (bits per byte: fewer by)")
    caption = (
        f"How much better {first} is than {second} (right of the line) or worse, with the "
        f"{LEVEL:.0%} interval; grey where that holds 0."
    )
    return to_picture(figure, "differences", caption)


def _bar_name(task: str, metric: Metric) -> str:
    return f"{task}: {metric_name(metric)}"


def _is_perplexity(metric: Metric) -> bool:
    return metric.name.endswith("_perplexity")


def _draw_bars(
    name: str, caption: str, sides: Mapping[str, Mapping[str, Score]], unit: str
) -> Picture:
    """Horizontal bars, side by side for several models."""
    labels = list(dict.fromkeys(label for bars in sides.values() for label in bars))
    width = 0.7 / len(sides)
    figure, axes = new_figure(7.5, 1.0 + (0.2 + 0.26 * len(sides)) * len(labels))
    places, longest = np.arange(len(labels))[::-1], 0.0
    for number, (side, bars) in enumerate(sides.items()):
        at = places + 0.35 - width * (number + 0.5)
        values = [bars[label].value if label in bars else 0.0 for label in labels]
        color = COLORS[number % len(COLORS)]
        axes.barh(at, values, height=width * 0.9, color=color, label=no_formula(side) or None)
        for place, label in zip(at, labels, strict=True):
            if label not in bars:
                axes.text(0, place, " not asked", va="center", color=SOFT, fontsize=8)
                continue
            error = bars[label].standard_error
            text = f" {bars[label].value:.3f}" + ("" if error is None else f" ± {error:.3f}")
            axes.text(bars[label].value, place, text, va="center", color=INK, fontsize=9)
            longest = max(longest, bars[label].value)
    axes.set_yticks(places, [no_formula(label) for label in labels])
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.25 * longest or 1)  # beyond the bars stand their numbers, and no ticks
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= longest or not longest])
    axes.grid(axis="y", visible=False)
    if len(sides) > 1:
        figure.legend(loc="outside upper right", ncols=len(sides), frameon=False, fontsize=9)
    return to_picture(figure, name, caption)
