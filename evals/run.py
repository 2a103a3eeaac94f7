"""Runs benchmarks on a trained run and writes their results beside it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint.provenance import weights_fingerprint
from checkpoint.run_corpus import open_run_corpus
from checkpoint.run_directory import read_run
from configs.checks import UserError, require
from evals.results import FILE, FILE_OF_INITIAL, write_results
from evals.tasks import line_completion, stdlib_bpb
from evals.tasks.base import ModelUnderTest, NotApplicable, Result, Skipped
from infer.load import inference_model
from infer.run_weights import RunWeights, load_with_identity
from infer.score import TokenScores, num_rows, score_documents
from model.transformer import Transformer, Variables

TASKS: dict[str, Callable[[ModelUnderTest], Result]] = {
    task.NAME: task.run for task in (stdlib_bpb, line_completion)
}

TOKENS_AT_ONCE = 4096
"""Tokens of a scoring batch."""

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


def check_tasks(names: Sequence[str]) -> None:
    """
    Raises:
      UserError: a name that is no task.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise UserError(f"unknown tasks {unknown}; there are {', '.join(TASKS)}")


@dataclass(frozen=True)
class Held:
    """A run's newest variables as they lie in memory: in few bits, or over a mesh."""

    name: str
    """Of the format and mesh, for the results' file."""
    model: Transformer
    variables: Variables
    mesh: Mesh | None


def evaluate(
    run_dir: Path,
    tasks: Sequence[str],
    progress: Callable[[str], Progress],
    initial: Variables | None = None,
    held: Held | None = None,
) -> Iterator[Result | Skipped]:
    """Runs the tasks one after the other; what is there already is in run_dir/evals.json.

    Args:
      progress: called with a task's name; gives the function that receives its progress.
      held: the run's newest variables in another format or on a mesh, to be scored as they are;
        the results go to evals_NAME.json.
      initial: what the run began with, to be scored in place of its newest variables; the results
        go to evals_initial.json.
    Raises:
      UserError: an unknown task, a run without checkpoint; at the end, if no task applied.
    """
    check_tasks(tasks)
    run = read_run(run_dir)
    corpus = open_run_corpus(run, run_dir)
    if initial is None:
        model, variables, weights = load_with_identity(run, run_dir)
    else:
        model, variables = inference_model(run), initial
        weights = RunWeights(step=0, sha256=weights_fingerprint(variables))
    path, mesh = run_dir / (FILE if initial is None else FILE_OF_INITIAL), None
    if held is not None:
        model, variables, mesh = held.model, held.variables, held.mesh
        path = path.with_name(f"{path.stem}_{held.name}.json")
    results: list[Result] = []
    for name in tasks:
        subject = ModelUnderTest(
            score=functools.partial(
                _score, model, variables, run.data.seq_len, progress(name), mesh
            ),
            length=run.data.seq_len,
            tokenizer=corpus.tokenizer,
            token_counts_V=corpus.token_counts_V,
            held_out=corpus.held_out,
        )
        try:
            results.append(dataclasses.replace(TASKS[name](subject), weights=weights))
        except NotApplicable as error:
            yield Skipped(name, str(error))
        else:
            write_results(path, results)
            yield results[-1]
    require(bool(results), f"none of the tasks {', '.join(tasks)} applies to {run_dir}")


def _score(
    model: Transformer,
    variables: Variables,
    length: int,
    progress: Progress,
    mesh: Mesh | None,
    documents: list[np.ndarray],
) -> list[TokenScores]:
    has_memory = model.config.memory_length is not None
    total = num_rows((len(tokens) for tokens in documents), length, has_memory=has_memory)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return score_documents(
            model,
            variables,
            documents,
            length=length,
            batch_size=max(TOKENS_AT_ONCE // length, 1),
            progress=lambda done: progress(done, total),
        )
