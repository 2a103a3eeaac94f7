"""Runs benchmarks on any model; a run's go into its evals.json, which its report.html shows, too.

    python -m scripts.evaluate runs/v31_nano --tasks stdlib_bpb,line_completion
    python -m scripts.evaluate runs/v31_nano --weights int8 --mesh.expert 2
    python -m scripts.evaluate runs/smollm2_code --initial
    python -m scripts.evaluate smollm2 --weights int4
    python -m scripts.evaluate models/mixtral --text letters/ --suffix .txt

A run is measured on the text that it did not learn from, any other model on this Python's library
or what --text names, of which a share is held out; text and results are kept under --folder.

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

from checkpoint.provenance import weights_fingerprint
from checkpoint.run_directory import read_run
from configs.checks import require
from evals.results import FILE, write_run_report
from evals.run import TASKS, Evaluated, Progress, check_tasks, evaluate, open_run, open_text
from evals.tasks.base import Result, Skipped
from infer.run_weights import RunWeights
from infer.sources import Source, open_source
from scripts import command
from scripts.model_options import add_model_options, asked_mesh, description, load_model
from scripts.sources import initial_variables
from train.progress import ProgressBar

FOLDER, SUFFIX, HELD_OUT = Path("runs/evals"), ".py", 0.01
LENGTH = 1024
"""Tokens that a model reads at once where its run does not say, at most."""


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("model", help="a run, a model's folder or file, or 'smollm2'")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all)")
    parser.add_argument("--initial", action="store_true", help="the weights the run began with")
    parser.add_argument("--text", help="'stdlib', a folder or a file; a run has its own")
    parser.add_argument("--suffix", help="of a folder's files to read (.py)")
    parser.add_argument("--held-out", type=float, help="share of the text (0.01)")
    parser.add_argument("--length", type=int, help=f"tokens read at once (at most {LENGTH:,})")
    parser.add_argument("--folder", type=Path, help=f"of text and results ({FOLDER})")
    add_model_options(parser, has_state=False)
    arguments = parser.parse_args(argv)
    mesh = asked_mesh(arguments)
    names = arguments.tasks.split(",")
    check_tasks(names)
    source = open_source(arguments.model)
    of_run = source.kind == "run" and arguments.text is None
    evaluated = (_run if of_run else _model_on_text)(source, arguments, mesh)
    newest = None
    for found in evaluate(evaluated, names, progress_bar):
        if isinstance(found, Skipped):
            print(f"{found.task} skipped: {found.reason}", flush=True)
        else:
            show(evaluated.title, [found])
            newest = found.weights
    if not of_run:
        print(f"results: {evaluated.path}", flush=True)
    elif evaluated.path.name == FILE and (source.path / "metrics.jsonl").exists():
        write_run_report(source.path, newest)


def _run(source: Source, arguments: argparse.Namespace, mesh: Mesh | None) -> Evaluated:
    """A run on its own text, in the format and on the mesh that were asked for."""
    name, run_dir = description(arguments), source.path
    for option in ("suffix", "held_out", "length", "folder"):
        value = getattr(arguments, option)
        require(
            value is None,
            f"--{option.replace('_', '-')} {value} goes with --text: a run is measured on its own "
            "text, as it was read",
        )
    if arguments.initial:
        require(not name, f"--initial is scored as it is: leave {name} out")
        return open_run(run_dir, initial_variables(read_run(run_dir), run_dir))
    evaluated = open_run(run_dir)
    if not name:
        return evaluated
    return evaluated.held_as(name, *load_model(source, arguments, mesh), mesh)


def _model_on_text(source: Source, arguments: argparse.Namespace, mesh: Mesh | None) -> Evaluated:
    """Any source on a text, as it is in memory."""
    require(
        not arguments.initial,
        f"--initial is of a run on its own text: leave it out for {source.name}",
    )
    longest = source.config.context_length
    length = min(LENGTH, longest) if arguments.length is None else arguments.length
    require(2 <= length <= longest, f"--length {length} must be from 2 to the model's {longest}")
    fraction = HELD_OUT if arguments.held_out is None else arguments.held_out
    require(
        0 < fraction < 1, f"--held-out {fraction} must lie between 0 and 1: a share of the text"
    )
    text, suffix = arguments.text or "stdlib", arguments.suffix or SUFFIX
    corpus, folder = open_text(source, text, suffix, fraction, arguments.folder or FOLDER)
    model, variables = load_model(source, arguments, mesh)
    weights = RunWeights(step=None, sha256=weights_fingerprint(variables))
    title, path = f"{source.name} on {text}", folder / FILE
    evaluated = Evaluated(title, model, variables, mesh, length, corpus, weights, path)
    name = description(arguments)
    return evaluated.held_as(name, model, variables, mesh) if name else evaluated


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
