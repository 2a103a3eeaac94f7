"""The picture of a sweep: what its runs came to, over the setting that they differ in."""

import ast
from collections.abc import Sequence

from train.compare import ComparedRun, config_differences, last_loss
from train.report import BLUE, Picture, draw_bars, new_figure, no_formula, to_picture


def draw_sweep(runs: Sequence[ComparedRun]) -> list[Picture]:
    """The final loss over the one number in which the runs differ, or a bar for each run.

    It is the loss on held-out text where all were measured, else the training loss. None of a
    single run.
    """
    if len(runs) < 2:
        return []
    is_measured = all(run.validated for run in runs)
    losses = [_measured(run) if is_measured else last_loss(run) for run in runs]
    unit = f"{'validation' if is_measured else 'training'} loss, nats per token"
    changed = config_differences(runs)
    values = _numbers(next(iter(changed.values()))) if len(changed) == 1 else None
    if values is None:
        bars = {run.name: loss for run, loss in zip(runs, losses, strict=True)}
        return [draw_bars("sweep", "The last loss of each run.", bars, {}, unit)]
    (setting,) = changed
    figure, axes = new_figure(7.5, 3.6)
    order = sorted(range(len(runs)), key=lambda i: values[i])
    axes.plot([values[i] for i in order], [losses[i] for i in order], "o-", color=BLUE)
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_xscale("log")
    axes.set_xlabel(no_formula(setting))
    axes.set_ylabel(unit)
    best = runs[min(range(len(runs)), key=lambda i: losses[i])].name
    return [to_picture(figure, "sweep", f"The last loss over {setting}; the least is {best}'s.")]


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
