"""The picture of a sweep: what its runs came to, over the setting that they differ in."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from train.compare import COLORS, ComparedRun, config_differences, last_loss
from train.report import Picture, draw_bars, label_ends, new_figure, no_formula, to_picture

WIDE_RANGE = 8
"""Largest over smallest value from which on the axis is logarithmic."""


@dataclass(frozen=True)
class _Lines:
    """Runs as lines over one setting; those of a line are alike in all others."""

    setting: str
    values: list[float]
    runs_of: dict[str, list[int]]
    """By what tells a line from the others, its runs in the order of their values; "" of one."""


def draw_sweep(runs: Sequence[ComparedRun]) -> list[Picture]:
    """The final loss over the one number in which runs differ, a line for each choice of what else
    they differ in; or a bar for each run.

    It is the loss on held-out text where all were measured, else the training loss. Runs that have
    not come to their last step are named and left out. None of a single run.
    """
    unfinished = [run.name for run in runs if run.lines[-1]["step"] < run.config.steps]
    runs = [run for run in runs if run.name not in unfinished]
    if len(runs) < 2:
        return []
    left_out = f" Not drawn, as they have steps to go: {', '.join(unfinished)}."
    left_out = left_out if unfinished else ""
    is_measured = all(run.validated for run in runs)
    losses = [_measured(run) if is_measured else last_loss(run) for run in runs]
    unit = f"{'validation' if is_measured else 'training'} loss, nats per token"
    found = _lines(config_differences(runs))
    if found is None:
        bars = {run.name: loss for run, loss in zip(runs, losses, strict=True)}
        return [draw_bars("sweep", f"The last loss of each run.{left_out}", bars, {}, unit)]
    figure, axes = new_figure(7.5, 3.6)
    ends: dict[str, tuple[float, float, str]] = {}
    for (label, line), color in zip(found.runs_of.items(), COLORS, strict=False):
        over, heights = [found.values[i] for i in line], [losses[i] for i in line]
        axes.plot(over, heights, "o-", color=color)
        ends[label] = (over[-1], heights[-1], color)
    if min(found.values) > 0 and max(found.values) / min(found.values) >= WIDE_RANGE:
        axes.set_xscale("log")
        ticks = sorted(set(found.values))
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])  # the decades' own overlap
        axes.minorticks_off()
    axes.set_xlabel(no_formula(found.setting))
    axes.set_ylabel(unit)
    if len(ends) > 1:
        label_ends(axes, ends)
    best = runs[min(range(len(runs)), key=losses.__getitem__)].name
    caption = f"The last loss over {found.setting}; the least is {best}'s.{left_out}"
    return [to_picture(figure, "sweep", caption)]


def _lines(changed: dict[str, list[str]]) -> _Lines | None:
    """The setting whose lines are longest; None where no number makes lines."""
    best: _Lines | None = None
    for setting, texts in changed.items():
        values = _numbers(texts)
        others = {name: own for name, own in changed.items() if name != setting}
        if values is None:
            continue
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in sorted(range(len(values)), key=values.__getitem__):
            groups.setdefault(tuple(own[i] for own in others.values()), []).append(i)
        lengths = [len({values[i] for i in line}) for line in groups.values()]
        if min(lengths) < 2 or len(groups) > len(COLORS):
            continue
        if best is None or len(groups) < len(best.runs_of):
            best = _Lines(setting, values, {_label(others, k): v for k, v in groups.items()})
    return best


def _label(others: dict[str, list[str]], key: tuple[str, ...]) -> str:
    """What tells a line apart: of the settings that differ beside the axis' the first that does so
    alone, else all."""
    pairs = list(zip(others, key, strict=True))
    num_lines = len(set(zip(*others.values(), strict=True))) if others else 1
    for name, value in pairs:
        if len(set(others[name])) == num_lines:
            return f"{name} {value}"
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _measured(run: ComparedRun) -> float:
    return run.validated[-1]["validation_loss"]


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The settings as numbers; None where one is none."""
    try:
        found = [ast.literal_eval(value) for value in values]
    except (ValueError, SyntaxError):  # of a run that has no such setting
        return None
    is_numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
    return [float(x) for x in found] if is_numbers else None
