"""The folder of a run: config.json, provenance.json, metrics.jsonl, checkpoints/, pictures, and
what it keeps of its corpus.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import (
    Provenance,
    resume_provenance,
    with_fingerprints_of,
    write_provenance,
)
from checkpoint.run_corpus import keep_corpus
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.serialization import differences, to_json
from data.locks import refuse_second
from data.pipeline import Corpus
from formats.atomic_folder import replace_text
from formats.small_files import read_record

LOCK = ".lock"
CHECKPOINTS, BEST = "checkpoints", "best"
"""Folders of a run: its newest checkpoints, and the one of the lowest validation loss."""
EXPERIMENT = "experiment.py"
"""The user's own file that a run comes from."""
MAY_CHANGE = (
    "steps",
    "mesh.",
    "execution.",
    "checkpoint.",
    "alarms.",
    "metrics.",
    "validation.",
    "samples.",
)
"""Settings that may differ when a run goes on; anything else would make it another experiment."""


@contextlib.contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from training in this folder while the block runs.

    Raises:
      UserError: one is at it, or the folder can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir} can't be written: {error.strerror}") from error
    refusal = (
        f"another process ({{process}}) is training in {run_dir}: wait for it, end it, or choose "
        "another --run-dir"
    )
    with refuse_second(run_dir / LOCK, refusal):
        yield


def open_run_dir(
    run: RunConfig,
    run_dir: Path,
    stated: Provenance,
    corpus: Corpus,
    experiment: str | None = None,
) -> Provenance:
    """Makes the folder and writes what it holds beside logs and checkpoints, or checks that it
    holds the same experiment, made from the same things; returns what the run was made from.

    A folder without a checkpoint has nothing to lose, and takes the new config.

    Args:
      stated: what the run is about to be made from, or to go on with.
      corpus: of the run; its tokenizer and held-out tokens are copied.
      experiment: text of the user's own file that the run comes from.
    Raises:
      UserError: another experiment, or a folder that can't be written.
    """
    goes_on = has_checkpoint(run_dir)
    known = _check_same(run, run_dir, stated) if goes_on else None
    if goes_on and known is None and stated.initial is not None:
        # Runs without fingerprints began to read at the first row.
        initial = dataclasses.replace(stated.initial, rows_read=0)
        stated = dataclasses.replace(stated, initial=initial)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / "config.json", to_json(run))
        if experiment is not None:
            _keep_experiment(run_dir, experiment)
        counts = keep_corpus(corpus, run_dir, known.corpus if known else None)
        now = dataclasses.replace(stated.corpus, token_counts=counts)
        made_from = with_fingerprints_of(now, known or stated)
        if made_from != known:
            write_provenance(run_dir, made_from)
    except OSError as error:
        raise UserError(f"{run_dir} can't be written: {error.strerror}") from error
    return made_from


def _keep_experiment(run_dir: Path, text: str) -> None:
    """Writes experiment.py; of a run that goes on with a changed file, the one before stays, too,
    under a name with the step up to which it was in use.
    """
    path, step = run_dir / EXPERIMENT, latest_step(run_dir / "checkpoints")
    if step is not None and path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(path.with_stem(f"{path.stem}_until_step_{step}"))
    replace_text(path, text)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run goes on in this folder."""
    return latest_step(run_dir / "checkpoints") is not None


def _check_same(run: RunConfig, run_dir: Path, stated: Provenance) -> Provenance | None:
    """Provenance of the run that lies there; None where it keeps no fingerprints."""
    if (run_dir / "config.json").exists():
        changed = differences(read_run(run_dir), run)
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
        require(
            not changed,
            f"{run_dir} holds a run with another config ({'; '.join(changed)}): choose another "
            "--run-dir, or give the settings it was started with",
        )
    known = resume_provenance(run_dir, stated, Path(run.data.directory))
    if known is None:
        print(
            f"note: {run_dir} was made before runs kept fingerprints: whether it goes on with the "
            "corpus and models it began with is not known; those of now are noted",
            file=sys.stderr,
            flush=True,
        )
    return known


def runs_inside(folder: Path) -> str:
    """Advice to who names a folder of runs in place of one; empty for any other folder."""
    names = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return f"it holds the runs {', '.join(names[:5])}{more}: name one of them"


def read_run(run_dir: Path) -> RunConfig:
    """The config a run directory was trained with.

    Raises:
      UserError: the folder is no run directory.
    """
    path = run_dir / "config.json"
    if not path.exists():
        advice = runs_inside(run_dir) or "it has no config.json"
        raise UserError(f"{run_dir} is no run directory: {advice}")
    return read_record(RunConfig, path, "restore it or start a new run")
