"""Asks several models something of every benchmark, and writes one page: `make evaluate`.

    python -m scripts.evaluate_all                     # SmolLM2 and the quickstart's models
    python -m scripts.evaluate_all smollm2 runs/mine --limit 100 --answers 20

A model that is not there is left out with its reason; so is a task whose package can't be had.
Interrupted, the same command goes on: what was asked is not asked again (scripts.evaluate, which
wrote it). The page's scores are of few samples, with their standard errors.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from configs.checks import UserError, require
from evals.page import write_overview_page
from evals.results_form import TaskScores
from evals.samples import OutputType, Task
from evals.task_list import find_tasks
from scripts import command, evaluate
from scripts.evaluated_model import open_named

QUICKSTART = ("runs/quickstart/teacher", "runs/quickstart/student")
MODELS = ("smollm2", *QUICKSTART)


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help="runs, folders, files, smollm2")
    parser.add_argument("--tasks", default="short", help="names or a set (short)")
    parser.add_argument("--limit", type=int, default=40, help="questions of a task (40)")
    parser.add_argument("--texts", type=int, default=4, help="whole texts of a task (4)")
    parser.add_argument("--answers", type=int, default=8, help="generated answers of a task (8)")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluations/overview"))
    arguments = parser.parse_args(argv)
    counts: dict[tuple[OutputType, ...], int] = {
        ("multiple_choice", "loglikelihood"): arguments.limit,
        ("loglikelihood_rolling",): arguments.texts,
        ("generate_until",): arguments.answers,
    }
    for option in ("limit", "texts", "answers"):
        count = getattr(arguments, option)
        require(count >= 1, f"--{option} {count} must be at least 1")
    tasks = find_tasks(arguments.tasks.split(","))
    command.keep_compiled()
    found: dict[str, list[TaskScores]] = {}
    left_out: dict[str, list[str]] = {}
    for name in arguments.models:
        scores, reasons = _ask(name, tasks, counts)
        print("\n".join(reasons), flush=True)
        if scores:
            found[name] = scores
        if reasons:
            left_out[name] = reasons
    reasons = [reason for each in left_out.values() for reason in each]
    require(bool(found), "no model could be asked: " + "; ".join(reasons))
    print(f"page: {write_overview_page(arguments.output, found, left_out)}")


def _ask(
    name: str, tasks: list[Task], counts: Mapping[tuple[OutputType, ...], int]
) -> tuple[list[TaskScores], list[str]]:
    """The model's scores, and why the others are missing.

    Args:
      counts: samples of each task, by what it asks of a model.
    """
    scores: list[TaskScores] = []
    reasons: list[str] = []
    try:
        opened = open_named(name, evaluate.make_parser().parse_args([name]), tasks, None, None)
    except UserError as error:
        is_to_come = name in QUICKSTART and not Path(name).exists()
        reason = "make quickstart makes it" if is_to_come else error
        return [], [f"{name} was left out: {reason}"]
    for asked, count in counts.items():
        chosen = [task for task in tasks if task.output_type in asked]
        if not chosen:
            continue
        settings = replace(opened.evaluation.settings, limit=count)
        limited = replace(opened, evaluation=replace(opened.evaluation, settings=settings))
        try:
            found, skipped = evaluate.run(limited, chosen)
        except UserError as error:
            reasons.append(f"{name} was left out: {error}")
            continue
        scores += found
        reasons += [f"{each.task}: {each.reason}" for each in skipped]
    return scores, list(dict.fromkeys(reasons))


if __name__ == "__main__":
    command.execute(main)
