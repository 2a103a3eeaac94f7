"""Runs benchmarks on a model and writes their results: a run beside it, others where asked."""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint.provenance import weights_fingerprint
from checkpoint.run_corpus import RunCorpus, count_tokens, open_run_corpus
from checkpoint.run_directory import read_run
from configs.base import DataConfig
from configs.checks import UserError, require
from data.corpora import read_documents
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import num_ids
from data.tokenizers.tokenizer_sources import load_public_tokenizer
from evals.results import FILE, FILE_OF_INITIAL, write_results
from evals.tasks import line_completion, stdlib_bpb
from evals.tasks.base import ModelUnderTest, NotApplicable, Result, Skipped
from infer.load import inference_model
from infer.run_weights import RunWeights, load_with_identity
from infer.score import TokenScores, num_rows, score_documents
from infer.sources import Source
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
class Evaluated:
    """A model as it lies in memory, the text it is measured on, and where its results go."""

    title: str
    model: Transformer
    variables: Variables
    mesh: Mesh | None
    length: int
    """Tokens it reads at once."""
    corpus: RunCorpus
    """In the model's own tokens."""
    weights: RunWeights
    path: Path
    """Of the results."""

    def held_as(
        self, name: str, model: Transformer, variables: Variables, mesh: Mesh | None
    ) -> "Evaluated":
        """The same weights in another format or on a mesh, with results of their own.

        Args:
          name: of format and mesh, for the results' file.
        """
        path = self.path.with_name(f"{self.path.stem}_{name}.json")
        return dataclasses.replace(self, model=model, variables=variables, mesh=mesh, path=path)


def open_run(run_dir: Path, initial: Variables | None = None) -> Evaluated:
    """A run's newest variables, on the text that it did not learn from.

    Args:
      initial: what the run began with, in place of its newest variables.
    Raises:
      UserError: a run without checkpoint, or one that lost what it keeps of its corpus.
    """
    run = read_run(run_dir)
    corpus = open_run_corpus(run, run_dir)
    if initial is None:
        model, variables, weights = load_with_identity(run, run_dir)
    else:
        model, variables = inference_model(run), initial
        weights = RunWeights(step=0, sha256=weights_fingerprint(variables))
    path, length = run_dir / (FILE if initial is None else FILE_OF_INITIAL), run.data.seq_len
    return Evaluated(str(run_dir), model, variables, None, length, corpus, weights, path)


def open_text(
    source: Source, text: str, suffix: str, fraction: float, folder: Path
) -> tuple[RunCorpus, Path]:
    """Held-out text in the source's own tokens, and the folder that keeps it and the results.

    Args:
      text: 'stdlib', a folder, or a file: see configs.base.DataConfig.
      fraction: of the text that is held out; the rest gives the unigram model its counts.
      folder: where texts and results are kept, by the names of both; a text also by what it and
        the tokenizer are now, so that another share or a changed file is read anew.
    Raises:
      UserError: a text or tokenizer that can't be read.
    """
    kept = folder / f"{_plain(source.name)}_on_{_plain(text)}"
    identity = hashlib.sha256(f"{fraction}\n{load_public_tokenizer(source.name).to_str()}".encode())
    for document in read_documents(text, suffix):
        identity.update(f"{document.name}\n{document.text}\n".encode())
    # A run's folder and a model's hold tokenizer.json; files and packages are known by name.
    settings = DataConfig(
        source=text,
        suffix=suffix,
        tokenizer=source.name,
        directory=str(kept / f"text_{identity.hexdigest()[:12]}"),
        holdout_fraction=fraction,
    )
    corpus = prepare_corpus(settings, source.config.vocab_size)
    tokenizer = corpus.tokenizer()
    counts_V = count_tokens(corpus.training(), num_ids(tokenizer))
    return RunCorpus(tokenizer, corpus.held_out(), counts_V), kept


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "text"


def evaluate(
    evaluated: Evaluated, tasks: Sequence[str], progress: Callable[[str], Progress]
) -> Iterator[Result | Skipped]:
    """Runs the tasks one after the other; what is there already is in evaluated.path.

    Args:
      progress: called with a task's name; gives the function that receives its progress.
    Raises:
      UserError: an unknown task; at the end, if no task applied.
    """
    check_tasks(tasks)
    corpus, results = evaluated.corpus, []
    for name in tasks:
        subject = ModelUnderTest(
            score=functools.partial(_score, evaluated, progress(name)),
            length=evaluated.length,
            tokenizer=corpus.tokenizer,
            token_counts_V=corpus.token_counts_V,
            held_out=corpus.held_out,
        )
        try:
            results.append(dataclasses.replace(TASKS[name](subject), weights=evaluated.weights))
        except NotApplicable as error:
            yield Skipped(name, str(error))
        else:
            write_results(evaluated.path, results)
            yield results[-1]
    require(bool(results), f"none of the tasks {', '.join(tasks)} applies to {evaluated.title}")


def _score(
    evaluated: Evaluated, progress: Progress, documents: list[np.ndarray]
) -> list[TokenScores]:
    model, length, mesh = evaluated.model, evaluated.length, evaluated.mesh
    has_memory = model.config.memory_length is not None
    total = num_rows((len(tokens) for tokens in documents), length, has_memory=has_memory)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return score_documents(
            model,
            evaluated.variables,
            documents,
            length=length,
            batch_size=max(TOKENS_AT_ONCE // length, 1),
            progress=lambda done: progress(done, total),
        )
