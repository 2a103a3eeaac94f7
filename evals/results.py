"""Files of results: results.json of an evaluation, evals.json beside a run, and its report."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.run_directory import read_run
from configs.checks import UserError, require
from configs.serialization import finite_json, from_tree
from evals.results_form import BY_TASK, UNKNOWN, ModelDescription, TaskScores
from formats.atomic_folder import replace_text
from formats.small_files import read_json
from infer.run_weights import RunWeights, newer_weights
from train.report import table, write_report

FILE, FILE_OF_INITIAL = "evals.json", "evals_initial.json"
"""Beside a run."""
RESULTS = "results.json"
AGAIN = "python -m scripts.evaluate makes it again"


@dataclass(frozen=True)
class Result:
    """A task's first metric, as tables and reports show it."""

    task: str
    version: int
    value: float
    standard_error: float
    unit: str
    count: int
    """Items the value is the mean of."""
    details: dict[str, Any] = field(default_factory=dict)
    weights: RunWeights | None = None
    """Which it speaks of; None in older files."""


def headline(found: TaskScores, weights: RunWeights | None = None) -> Result:
    """The first metric of a task, with the baselines beside it."""
    metric = found.task.metrics[0]
    score = found.total.scores[metric]
    unit = str(found.task.metadata.get("unit", metric.name))
    error = score.standard_error or 0.0
    return Result(
        found.task.name,
        found.task.version,
        score.value,
        error,
        unit,
        found.total.count,
        dict(found.baselines),
        weights,
    )


def write_results(path: Path, tree: Mapping[str, Any]) -> None:
    """Replaces the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, finite_json(dict(tree), indent=2, ensure_ascii=False) + "\n")


def with_earlier(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tree with the tasks that lie in the file already and are not in it.

    Raises:
      UserError: the file is of another model, or damaged.
    """
    earlier = _read_tree(path)
    if earlier is None:
        return tree
    _require_same(earlier, tree["identity"], path)
    made = {name: dict(tree[name]) for name in BY_TASK}
    gone = {n for task in tree["group_subtasks"] for n in earlier["group_subtasks"].get(task, ())}
    for section in BY_TASK:
        old = {k: v for k, v in earlier.get(section, {}).items() if k not in gone}
        made[section] = {**old, **made[section]}
    return {**tree, **made}


def require_same_model(path: Path, model: ModelDescription) -> None:
    """
    Raises:
      UserError: the file is there, and of another model, or damaged.
    """
    earlier = _read_tree(path)
    if earlier is not None:
        _require_same(earlier, model.identity(), path)


def _require_same(tree: Mapping[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    changed = [k for k, v in identity.items() if tree.get("identity", {}).get(k) != v]
    require(
        not changed,
        f"{path} has results of another model (its {', '.join(changed)} differ): choose another "
        "--output, or remove the folder",
    )


def read_results(path: Path) -> list[Result]:
    """The first metric of each task in results.json or evals.json; empty where there is no file.

    Raises:
      UserError: it is damaged.
    """
    try:
        tree = read_json(path, AGAIN)
    except FileNotFoundError:
        return []
    try:
        if isinstance(tree, list):  # as it was written before it had lm-evaluation-harness' form
            return from_tree(list[Result], tree, str(path))
        return _results_of(tree)
    except UserError as error:
        raise UserError(f"{error}: {AGAIN}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {AGAIN}") from error


def samples_folder(path: Path) -> Path | None:
    """Where the samples behind a file of results lie; None: it does not say, or they are gone."""
    tree = _read_tree(path)
    folder = None if tree is None else tree.get("samples_folder")
    found = path.parent / folder if isinstance(folder, str) else None
    return found if found is not None and found.is_dir() else None


def _results_of(tree: dict[str, Any]) -> list[Result]:
    weights = tree["weights"] and from_tree(RunWeights, tree["weights"], "weights")
    found = []
    for name, config in tree["configs"].items():
        metric = config["metric_list"][0]
        scores, form = tree["results"][name], "{}{},{}"
        value = scores[form.format(metric["metric"], "", metric["filter"])]
        error = scores[form.format(metric["metric"], "_stderr", metric["filter"])]
        found.append(
            Result(
                task=name,
                version=int(tree["versions"][name]),
                value=float("nan") if value is None else float(value),
                standard_error=0.0 if error in (None, UNKNOWN) else float(error),
                unit=config["metadata"].get("unit") or metric["metric"],
                count=int(tree["n-samples"][name]["effective"]),
                details=tree.get("baselines", {}).get(name, {}),
                weights=weights or None,
            )
        )
    return found


def _read_tree(path: Path) -> dict[str, Any] | None:
    """results.json; None where there is none.

    Raises:
      UserError: it is damaged, or of another form.
    """
    try:
        tree = read_json(path, "remove it")
    except FileNotFoundError:
        return None
    is_ours = isinstance(tree, dict) and all(
        isinstance(tree.get(name, {}), dict) for name in (*BY_TASK, "identity")
    )
    require(is_ours, f"{path} is no result of ours: choose another --output, or remove it")
    return tree


def write_run_report(run_dir: Path, newest: RunWeights | None = None) -> None:
    """`train.report.write_report` with the run's results; stale ones say so.

    Args:
      newest: the run's newest weights, where they are known: otherwise they are read if need be.
    Raises:
      UserError: there is no metrics.jsonl, or it is damaged.
    """
    write_report(run_dir, _section(run_dir, newest))


def stale_reason(result: Result, run_dir: Path, newest: RunWeights | None = None) -> str | None:
    """Why a result does not speak of the run's newest weights; None where it does."""
    if result.weights is None:
        return "measured before results kept which weights they are of"
    if newest is not None:
        other = None if result.weights == newest else str(newest)
    else:
        other = newer_weights(result.weights, read_run(run_dir), run_dir)
    return other and f"of {result.weights}, the newest are {other}"


def _section(run_dir: Path, newest: RunWeights | None) -> list[str]:
    """HTML of the results; none where nothing was measured."""
    try:
        results = read_results(run_dir / FILE)
    except UserError as error:
        return [f"<p>{html.escape(str(error))}</p>"]
    reasons = {r.weights: stale_reason(r, run_dir, newest) for r in results}
    rows = {}
    for r in results:
        reason = reasons[r.weights]
        stale = f"; stale: {reason}; scripts.evaluate measures it again" if reason else ""
        rows[r.task] = f"{r.value:.4f} ± {r.standard_error:.4f} {r.unit}{stale}"
    return [table(rows)] if rows else []
