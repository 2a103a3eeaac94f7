"""Runs benchmarks on a trained run and writes its evals.json, which its report.html shows, too.

    python -m scripts.evaluate runs/v31_nano --tasks stdlib_bpb,line_completion
    python -m scripts.evaluate runs/v31_nano --weights int8 --mesh.expert 2
    python -m scripts.evaluate runs/smollm2_code --initial

With --initial it is the trained model the run began with (init.source), upcycled where the run's
is; evals_initial.json has the results. Weights in another format or on a mesh have theirs in
evals_int8_expert2.json and the like.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from checkpoint.run_directory import read_run
from configs.checks import require
from evals.results import write_run_report
from evals.run import TASKS, Held, Progress, check_tasks, evaluate
from evals.tasks.base import Result, Skipped
from infer.sources import open_source
from scripts import command
from scripts.model_options import add_model_options, asked_mesh, description, load_model
from scripts.sources import initial_variables
from train.progress import ProgressBar


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a trained run")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all)")
    parser.add_argument("--initial", action="store_true", help="the weights the run began with")
    add_model_options(parser, has_state=False)
    arguments = parser.parse_args(argv)
    mesh = asked_mesh(arguments)
    names, run_dir = arguments.tasks.split(","), arguments.run_dir
    check_tasks(names)
    first = initial_variables(read_run(run_dir), run_dir) if arguments.initial else None
    held, newest = _held(arguments, mesh), None
    for found in evaluate(run_dir, names, progress_bar, first, held):
        if isinstance(found, Skipped):
            print(f"{found.task} skipped: {found.reason}", flush=True)
        else:
            show(str(run_dir), [found])
            newest = found.weights
    if first is None and held is None and (run_dir / "metrics.jsonl").exists():
        write_run_report(run_dir, newest)


def _held(arguments: argparse.Namespace, mesh: Mesh | None) -> Held | None:
    """The newest variables in the format and on the mesh that were asked for; None: as trained."""
    name = description(arguments)
    if not name:
        return None
    require(not arguments.initial, f"--initial is scored as it is: leave {name} out")
    return Held(name, *load_model(open_source(str(arguments.run_dir)), arguments, mesh), mesh)


def progress_bar(name: str) -> Progress:
    """A progress bar that appears with the first rows and goes when all are done."""
    bars: list[ProgressBar] = []

    def update(done: int, total: int) -> None:
        if not bars:
            bars.append(ProgressBar(name, total=total, unit="windows").__enter__())
        bars[0].update(done)
        if done == total:
            bars.pop().__exit__(None, None, None)

    return update


def show(title: str, results: Iterable[Result]) -> None:
    """Prints a table of results."""
    table = Table("task", "value", "of", "beside it", title=title)
    for r in results:
        value = f"{r.value:.4f} ± {r.standard_error:.4f} {r.unit}"
        beside = "\n".join(f"{k} {v:.3f}" for k, v in r.details.items() if isinstance(v, float))
        table.add_row(r.task, value, str(r.count), beside)
    Console().print(table)


if __name__ == "__main__":
    command.execute(main)
