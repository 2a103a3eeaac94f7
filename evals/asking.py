"""Asks a model a task's samples, and scores each answer as it comes."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from evals import records, scoring
from evals.records import Record, SampleFile
from evals.samples import (
    Answer,
    Choices,
    EvaluatedModel,
    Likelihood,
    Prompt,
    Rolling,
    Sample,
    Task,
    Text,
    Tokens,
)
from evals.tasks.base import NotApplicable
from infer.score import TokenScores
from train.progress import ProgressBar


def ask(
    model: EvaluatedModel,
    task: Task,
    pending: Mapping[str, tuple[int, Sample]],
    file: SampleFile,
    *,
    unprotected: bool = False,
) -> None:
    """Asks the model, and appends each sample to the file when it is finished.

    Args:
      pending: draw of few-shot examples and sample, by the sample's hash.
      unprotected: see evals.run.Settings.
    """
    if not pending:
        return
    if task.runs_code and task.score is not None:
        score = functools.partial(cast(Any, task.score), unprotected=unprotected)
        task = dataclasses.replace(task, score=score)
    done, total = len(file.records), len(file.records) + len(pending)
    began, asked = time.monotonic(), list(pending.values())
    with ProgressBar(task.name, total=total, done=done, unit="samples") as bar:

        def finished(record: Record) -> None:
            file.add(record)
            made = len(file.records)
            rate = (made - done) / max(time.monotonic() - began, 1e-9)
            bar.update(made, f"{rate:.2g} samples/s")

        by_kind = {Choices: _ask_choices, Text: _ask_texts, Prompt: _ask_prompts}
        by_kind |= {Tokens: _ask_tokens}
        for kind, ask_kind in by_kind.items():
            of_kind = [(draw, sample) for draw, sample in asked if isinstance(sample, kind)]
            if of_kind:
                cast(Any, ask_kind)(model, task, of_kind, finished)


_Finished = Callable[[Record], None]


def _ask_choices(
    model: EvaluatedModel, task: Task, asked: Sequence[tuple[int, Choices]], finished: _Finished
) -> None:
    pairs = [(s.context, choice) for _, s in asked for choice in s.choices]
    owners = [i for i, (_, s) in enumerate(asked) for _ in s.choices]
    first = np.cumsum([0, *(len(s.choices) for _, s in asked)])
    found: list[dict[int, Likelihood]] = [{} for _ in asked]

    def take(place: int, likelihood: Likelihood) -> None:
        i = owners[place]
        draw, sample = asked[i]
        found[i][place - int(first[i])] = likelihood
        if len(found[i]) == len(sample.choices):
            likelihoods = [found[i][k] for k in range(len(sample.choices))]
            found_values = scoring.score_choices(sample, likelihoods)
            values = {m: v for m, v in found_values.items() if m in task.metrics}
            finished(records.choices_record(task, sample, likelihoods, values, draw))

    model.log_likelihoods(pairs, take)


def _ask_texts(
    model: EvaluatedModel, task: Task, asked: Sequence[tuple[int, Text]], finished: _Finished
) -> None:
    def take(i: int, found: Rolling) -> None:
        draw, sample = asked[i]
        values = scoring.score_text(sample.text, found)
        values = {metric: values[metric] for metric in task.metrics}
        finished(records.text_record(task, sample, found.nats, found.num_tokens, values, draw))

    model.rolling([sample.text for _, sample in asked], take)


class _ScoresTokens(Protocol):
    """A model on this machine."""

    def score_tokens(
        self, documents: Sequence[np.ndarray], on_answer: Callable[[int, TokenScores], None]
    ) -> Any: ...


def _ask_tokens(
    model: EvaluatedModel, task: Task, asked: Sequence[tuple[int, Tokens]], finished: _Finished
) -> None:
    if not hasattr(model, "score_tokens"):
        raise NotApplicable("it needs a model on this machine")

    def take(i: int, found: TokenScores) -> None:
        draw, sample = asked[i]
        nats = 0.0 - float(found.nats.sum(dtype=np.float64))
        values = scoring.score_tokens(sample, found)
        finished(records.text_record(task, sample, nats, len(found.nats), values, draw))

    cast(_ScoresTokens, model).score_tokens([sample.tokens for _, sample in asked], take)


def _ask_prompts(
    model: EvaluatedModel, task: Task, asked: Sequence[tuple[int, Prompt]], finished: _Finished
) -> None:
    assert task.score is not None, f"{task.name} does not say how answers are scored"
    score = task.score

    def take(i: int, answers: list[Answer]) -> None:
        draw, sample = asked[i]
        values = dict(score(sample, answers))
        assert set(values) <= set(task.metrics), f"{task.name} has metrics that it does not list"
        finished(records.prompt_record(task, sample, answers, values, draw))

    model.generate([sample for _, sample in asked], take)
