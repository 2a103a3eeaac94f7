"""Evaluations of runs that are compared: their scores in one table, and sample by sample.

Scores lie beside each run (evals.json), the samples behind them in the folder that it names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.checks import UserError
from evals.comparison import Difference, compare_records
from evals.records import read_samples
from evals.results import FILE, Result, read_results, samples_folder
from evals.run import samples_path
from evals.samples import Task
from evals.task_list import find_tasks


@dataclass(frozen=True)
class RunEvaluations:
    """What was measured of one run."""

    name: str
    results: dict[str, Result]
    """The first metric of each task, by the task's name."""
    samples: Path | None
    """Folder of the samples; None where it is not known or gone."""


def read_evaluations(names: Sequence[str], folders: Sequence[Path]) -> list[RunEvaluations]:
    """The runs' evaluations; of one that has none, nothing.

    Raises:
      UserError: a file of results that is damaged.
    """
    found = []
    for name, folder in zip(names, folders, strict=True):
        results = {result.task: result for result in read_results(folder / FILE)}
        found.append(RunEvaluations(name, results, samples_folder(folder / FILE)))
    return found


def score_rows(evaluations: Sequence[RunEvaluations]) -> dict[str, list[str]]:
    """Rows of a table with a column for each run: value, standard error and samples of a task."""
    tasks = dict.fromkeys(task for each in evaluations for task in each.results)

    def cell(result: Result | None) -> str:
        if result is None:
            return "-"
        return f"{result.value:.4f} ± {result.standard_error:.4f} ({result.count})"

    def title(task: str) -> str:
        unit = next(each.results[task].unit for each in evaluations if task in each.results)
        return f"{task}, {unit}"

    return {title(t): [cell(each.results.get(t)) for each in evaluations] for t in tasks}


def paired_differences(first: RunEvaluations, second: RunEvaluations) -> list[Difference]:
    """The differences over the samples that both runs answered; none where samples are missing."""
    if first.samples is None or second.samples is None:
        return []
    found: list[Difference] = []
    for name in first.results:
        task = _task(name)
        if task is None or name not in second.results:
            continue
        paths = [samples_path(folder, task) for folder in (first.samples, second.samples)]
        if all(path.exists() for path in paths):
            found += compare_records(task, *(read_samples(path, task) for path in paths))
    return found


def _task(name: str) -> Task | None:
    """The task of that name; None of one that there is no more, such as a file that is gone."""
    try:
        return find_tasks([name])[0]
    except UserError:
        return None
