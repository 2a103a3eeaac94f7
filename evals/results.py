"""Results of a run's benchmarks as they lie beside it (evals.json), and whether they are stale."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from checkpoint.run_directory import read_run
from configs.checks import UserError
from configs.serialization import finite_json
from evals.tasks.base import Result
from formats.atomic_folder import replace_text
from formats.small_files import read_record
from infer.run_weights import RunWeights, newer_weights
from train.report import table, write_report

FILE, FILE_OF_INITIAL = "evals.json", "evals_initial.json"


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Replaces the file as a whole."""
    written = [dataclasses.asdict(result) for result in results]
    replace_text(path, finite_json(written, indent=2) + "\n")


def read_results(path: Path) -> list[Result]:
    """What `write_results` wrote; empty where the file is missing.

    Raises:
      UserError: it is damaged.
    """
    try:
        return read_record(list[Result], path, "python -m scripts.evaluate makes it again")
    except FileNotFoundError:
        return []


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
