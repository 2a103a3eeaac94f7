"""Runs benchmarks on any model, and compares two.

    python -m scripts.evaluate runs/v31_nano
    python -m scripts.evaluate runs/student --against runs/teacher --tasks quick
    python -m scripts.evaluate smollm2 --tasks exams_es,my_questions.jsonl --weights int8
    python -m scripts.evaluate smollm2 --tasks bpb:letters/
    python -m scripts.evaluate models/mixtral --text letters/ --suffix .txt --mesh.expert 4
    python -m scripts.evaluate http://127.0.0.1:8000/v1 --tasks exams_es,gsm8k
    python -m scripts.evaluate --tasks list

The output's folder gets results.json (in lm-evaluation-harness' form), samples_TASK.jsonl and
report.html. Interrupted, the same command goes on: no finished sample is asked again. A run's
results go into its evals.json, too, which its own report shows.

Without --tasks, held-out text is measured: of a run what it did not learn from, of any other model
a share of this Python's library, or of what --text names. With --initial a run is the trained model
it began with (init.source), upcycled where the run's is; evals_initial.json has the results.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.checks import require
from evals.comparison import write_comparison
from evals.local_model import BATCH_TOKENS
from evals.page import print_differences, print_scores, write_comparison_page, write_scores_page
from evals.results import FILE, RESULTS, write_run_report
from evals.results_form import TaskScores
from evals.run import Skipped, evaluate, plain_name
from evals.samples import Task
from evals.task_list import HELD_OUT, describe_tasks, find_tasks
from scripts import command
from scripts.evaluated_model import Opened, add_text_options, check_named, open_named
from scripts.model_options import add_model_options, asked_mesh


def main(argv: list[str]) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.tasks == "list":
        print(describe_tasks())
        return
    require(arguments.model is not None, "name a model: a run, a folder, a file, or smollm2")
    tasks, mesh = find_tasks(arguments.tasks.split(",")), asked_mesh(arguments)
    command.keep_compiled()
    check_named(arguments.against)  # before the first one is asked
    opened = open_named(arguments.model, arguments, tasks, mesh, arguments.output)
    found = run_all(opened, tasks)
    if arguments.against is not None:
        arguments.initial, arguments.adapter = False, None
        output = arguments.output and arguments.output / f"against_{plain_name(arguments.against)}"
        other = open_named(arguments.against, arguments, tasks, mesh, output)
        names, folder = (opened.name, other.name), opened.evaluation.output
        differences = write_comparison(folder, *names, found, run_all(other, tasks))
        print_differences(*names, differences)
        print(f"page: {write_comparison_page(folder, *names, differences)}")


def run_all(opened: Opened, tasks: Sequence[Task]) -> list[TaskScores]:
    """As `run`.

    Raises:
      UserError: at the end, of tasks that could not be run.
    """
    found, skipped = run(opened, tasks)
    failed: dict[str, list[str]] = {}
    for each in skipped:
        if each.is_error:
            failed.setdefault(each.reason, []).append(each.task)
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in failed.items()]
    require(not failed, "; ".join(reasons))
    return found


def run(opened: Opened, tasks: Sequence[Task]) -> tuple[list[TaskScores], list[Skipped]]:
    """Runs the tasks, shows each when it is there, and writes the pages; and what was left out."""
    evaluation, path = opened.evaluation, opened.path
    found: list[TaskScores] = []
    skipped: list[Skipped] = []
    for each in evaluate(evaluation, tasks):
        if isinstance(each, TaskScores):
            found.append(each)
            print_scores(opened.name, each)
        else:
            skipped.append(each)
            if not each.is_error:
                print(f"{each.task} skipped: {each.reason}", flush=True)
    if found:
        page = write_scores_page(evaluation.output, opened.name, found)
        print(f"results: {evaluation.output / RESULTS}, page: {page}", flush=True)
        is_beside = path is not None and path / FILE in evaluation.copies
        if path is not None and is_beside and (path / "metrics.jsonl").exists():
            write_run_report(path, evaluation.description.weights)
    return found, skipped


def make_parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("model", nargs="?", help="run, folder, file, 'smollm2', or a server")
    parser.add_argument(
        "--tasks",
        default=",".join(HELD_OUT),
        help="comma-separated names, or 'list' (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="samples of a task at most")
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="examples (the task's own)")
    parser.add_argument("--seeds", type=int, default=1, metavar="S", help="draws of examples (1)")
    parser.add_argument("--against", metavar="OTHER", help="a model to be compared with")
    parser.add_argument("--output", type=Path, help="folder of results (below runs/evaluations)")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="of a batch (4096)",
    )
    parser.add_argument(
        "--unprotected", action="store_true", help="a model's code runs with your own rights"
    )
    add_text_options(parser)
    add_model_options(parser, has_state=False)
    return parser


if __name__ == "__main__":
    command.execute(main)
