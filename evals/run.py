"""Runs tasks on a model: what is finished is kept, sample by sample, and never asked again."""

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.checks import UserError, require
from evals import records
from evals.aggregation import aggregate
from evals.asking import ask
from evals.records import OtherSamples, Record, SampleFile, set_aside
from evals.results import RESULTS, require_same_model, with_earlier, write_results
from evals.results_form import GroupScores, ModelDescription, TaskScores, results_tree, sha256
from evals.samples import (
    Choices,
    EvaluatedModel,
    HeldOut,
    Load,
    Prompt,
    Sample,
    Task,
)
from evals.sandbox_command import find_bubblewrap
from evals.tasks.base import NotApplicable, Skipped

MOST_DRAWS = 100


@dataclass(frozen=True)
class Settings:
    """What is asked of each task."""

    limit: int | None = None
    """Samples at most."""
    num_fewshot: int | None = None
    """None: the task's own."""
    num_draws: int = 1
    """Draws of few-shot examples, with seeds 0, 1, 2, ..."""
    unprotected: bool = False
    """Whether a model's code runs with the rights of this process where a task runs any."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("limit", self.limit, 1),
            ("num-fewshot", self.num_fewshot, 0),
            ("seeds", self.num_draws, 1),
        ):
            require(value is None or value >= least, f"--{name} {value} must be at least {least}")
        require(
            self.num_draws <= MOST_DRAWS, f"--seeds {self.num_draws} must be at most {MOST_DRAWS}"
        )

    def num_fewshot_of(self, task: Task) -> int:
        return task.num_fewshot if self.num_fewshot is None else self.num_fewshot


@dataclass(frozen=True)
class Evaluation:
    """A model, what is asked of it, and where the answers lie."""

    model: EvaluatedModel
    description: ModelDescription
    settings: Settings
    output: Path
    """Receives results.json and samples_TASK.jsonl."""
    held_out: Callable[[], HeldOut] | None = None
    """Made for tasks that need it; None: there is none."""
    copies: Sequence[Path] = field(default_factory=tuple)
    """Files that get what results.json gets."""
    may_set_aside: bool = False
    """Whether samples in the way are renamed; otherwise they are refused."""


def evaluate(evaluation: Evaluation, tasks: Sequence[Task]) -> Iterator[TaskScores | Skipped]:
    """Runs the tasks one after the other; results.json has what is finished.

    Raises:
      UserError: the folder has another model's results; at the end, if no task applied.
    """
    path, began = evaluation.output / RESULTS, time.time()
    try:
        require_same_model(path, evaluation.description)
    except UserError:
        if not evaluation.may_set_aside:
            raise
        set_aside(path)
    finished: list[TaskScores] = []
    skipped: list[Skipped] = []
    for task in tasks:
        try:
            finished.append(evaluate_task(evaluation, task))
        except UserError as error:
            is_error = not isinstance(error, NotApplicable)
            skipped.append(Skipped(task.name, str(error), is_error))
            yield skipped[-1]
            continue
        _write(evaluation, finished, began)
        yield finished[-1]
    names = ", ".join(task.name for task in tasks)
    require(
        bool(finished) or any(x.is_error for x in skipped),
        f"none of the tasks {names} applies to {evaluation.description.name}",
    )


def _write(evaluation: Evaluation, finished: Sequence[TaskScores], began: float) -> None:
    settings = {
        "limit": evaluation.settings.limit,
        "num_fewshot": evaluation.settings.num_fewshot,
        "num_draws": evaluation.settings.num_draws,
    }
    tree = results_tree(evaluation.description, finished, settings, began, time.time() - began)
    path = evaluation.output / RESULTS
    tree = with_earlier(tree, path)
    write_results(path, tree)
    for copy in evaluation.copies:
        folder = os.path.relpath(evaluation.output.resolve(), copy.parent.resolve())
        write_results(copy, {**tree, "samples_folder": folder})


def samples_path(folder: Path, task: Task) -> Path:
    """Where a task's samples lie."""
    return folder / f"samples_{plain_name(task.name)}.jsonl"


def plain_name(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "text"


# --- One task -------------------------------------------------------------------------------------


def evaluate_task(evaluation: Evaluation, task: Task) -> TaskScores:
    """Asks what is not finished, and scores all of it.

    Raises:
      NotApplicable: the task has nothing to ask of this model.
      UserError: its data are missing, the samples' file is of something else, or it runs code and
        there is no sandbox.
    """
    settings, held_out = evaluation.settings, None
    if task.runs_code and not settings.unprotected:
        find_bubblewrap()
    if task.needs_held_out and evaluation.held_out is not None:
        held_out = evaluation.held_out()
    num_fewshot = settings.num_fewshot_of(task)
    loads = [
        Load(num_fewshot, seed, settings.limit, held_out) for seed in range(settings.num_draws)
    ]
    draws = [list(task.load(load))[: settings.limit] for load in loads]
    for samples in draws:
        _check_samples(task, samples)
    began = time.monotonic()
    with _sample_file(evaluation, task, num_fewshot, draws) as file:
        pending = _pending(draws, file)
        ask(evaluation.model, task, pending, file, unprotected=settings.unprotected)
        by_draw = [[file.records[records.sample_hash(s)] for s in samples] for samples in draws]
        file.finish([record for found in by_draw for record in found])
    baselines = {} if task.baselines is None else dict(task.baselines(loads[0]))
    is_chat = any(isinstance(s, Prompt) and not isinstance(s.prompt, str) for s in draws[0])
    return dataclasses.replace(
        summarize(task, num_fewshot, by_draw),
        baselines=baselines,
        uses_chat_template=is_chat,
        seconds=time.monotonic() - began,
        num_asked=len(pending),
    )


def _sample_file(
    evaluation: Evaluation, task: Task, num_fewshot: int, draws: Sequence[Sequence[Sample]]
) -> SampleFile:
    """The task's file, with other samples out of the way where they may be.

    Raises:
      OtherSamples: they may not.
    """
    path = samples_path(evaluation.output, task)
    made = SampleFile(path, task, _identity(evaluation, task, num_fewshot))
    if not (evaluation.may_set_aside and path.exists()):
        return made
    try:
        with made:
            _pending(draws, made)
    except OtherSamples:
        print(f"note: other samples of {task.name} were put into {set_aside(path)}", flush=True)
    return SampleFile(path, task, made.identity)


def _identity(evaluation: Evaluation, task: Task, num_fewshot: int) -> str:
    """What the samples of a file have in common: model, format, task version and settings."""
    said = evaluation.description.identity() | {
        "task": task.name,
        "version": task.version,
        "num_fewshot": num_fewshot,
    }
    if task.output_type in ("loglikelihood_rolling", "loglikelihood"):
        said["window"] = evaluation.description.window
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _check_samples(task: Task, samples: Sequence[Sample]) -> None:
    """
    Raises:
      NotApplicable: there are none.
    """
    if not samples:
        raise NotApplicable("it has no samples")
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys), f"{task.name} has two samples of one key"
    for sample in samples:
        if isinstance(sample, Choices):
            assert 0 <= sample.answer < len(sample.choices), f"{task.name}: {sample.key}"


def _pending(draws: Sequence[Sequence[Sample]], file: SampleFile) -> dict[str, tuple[int, Sample]]:
    """Draw and sample by hash, of those that are not finished; equal ones are asked once.

    Raises:
      OtherSamples: the file holds a sample of the same key and draw, and other content.
    """
    known = {(record.key, record.draw): record.sample_hash for record in file.records.values()}
    pending = {}
    for draw, samples in enumerate(draws):
        for sample in samples:
            name = records.sample_hash(sample)
            if name in file.records or name in pending:
                continue
            if known.get((sample.key, draw), name) != name:
                raise OtherSamples(
                    f"{file.path} holds an answer to another {sample.key!r}, for the task's data "
                    "have changed: choose another --output, or remove the file"
                )
            pending[name] = (draw, sample)
    return pending


# --- Scores of a task -----------------------------------------------------------------------------


def summarize(task: Task, num_fewshot: int, by_draw: Sequence[Sequence[Record]]) -> TaskScores:
    """The scores of a task and of its groups.

    Args:
      by_draw: the samples of each draw of few-shot examples, in the task's order.
    """
    first = by_draw[0]
    groups = {
        group: [[r for r in found if r.group == group] for found in by_draw]
        for group in dict.fromkeys(record.group for record in first)
        if group
    }
    if len(groups) == 1 and all(record.group for record in first):
        groups = {}  # it is the whole task
    lines = [line for record in first for line in record.lines]
    hashes = "".join(x["doc_hash"] + x["prompt_hash"] + x["target_hash"] for x in lines)
    return TaskScores(
        task=task,
        num_fewshot=num_fewshot,
        total=_scores(task, by_draw),
        groups={name: _scores(task, members) for name, members in groups.items()},
        data_sha256=sha256("".join(record.sample_hash for record in first)),
        task_hash=sha256(hashes),
        records=[record for found in by_draw for record in found],
        num_draws=len(by_draw),
    )


def _scores(task: Task, by_draw: Sequence[Sequence[Record]]) -> GroupScores:
    scores = {}
    for metric in task.metrics:
        draws = [
            {r.key: r.values[metric] for r in found if metric in r.values} for found in by_draw
        ]
        if all(draws):
            scores[metric] = aggregate(metric, draws)
    everything = [record for found in by_draw for record in found]
    answers = sum(record.num_answers for record in everything)
    return GroupScores(
        scores=scores,
        count=len(by_draw[0]),
        empty_rate=sum(r.num_empty for r in everything) / answers if answers else None,
        truncated_rate=sum(r.num_truncated for r in everything) / answers if answers else None,
        cut_rate=sum(r.is_cut for r in everything) / len(everything),
    )
