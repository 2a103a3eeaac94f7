"""Provenance of a run: fingerprints of what it was made from.

They lie in the run's folder (provenance.json) and in each checkpoint, beside the tokenizer itself.
Names and settings are known from config.json; a fingerprint tells whether what stands behind a name
is still the same. Runs made before this was kept have none, and are read without.
"""

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from checkpoint.orbax_store import latest_step, read_metadata
from configs.checks import require
from configs.serialization import from_json, to_json
from data.pipeline import CorpusFingerprints
from formats.atomic_folder import replace_text
from formats.small_files import read_record
from parallel.distributed import on_host

FILE = "provenance.json"
KEY, TOKENIZER_KEY = "provenance", "tokenizer"
"""Keys in a checkpoint's metadata, beside the config's settings."""

Objective = Literal["next_token", "fine_tuning", "preference", "distillation"]
VERBS: dict[Objective, str] = {
    "next_token": "scripts.train",
    "fine_tuning": "scripts.train",
    "preference": "scripts.train",
    "distillation": "scripts.distill",
}


@dataclass(frozen=True, kw_only=True)
class ModelOrigin:
    """A trained model that a run began with, or learns from."""

    name: str
    """Folder, file or name that it was read from."""
    weights: str
    """SHA-256, see `weights_fingerprint`."""
    step: int | None = None
    """Steps it was trained for; None for a model of others."""
    settings: tuple[str, ...] = ()
    """Options of what was done with it, as on the command line: '--operator copy'."""
    rows_read: int = 0
    """Rows of the run's own data order that it had read: the run reads on after them."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" at step {self.step}"
        return " ".join([f"{self.name}{step} (weights {self.weights[:8]})", *self.settings])


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Fingerprints of what one run was made from."""

    objective: Objective = "next_token"
    corpus: CorpusFingerprints
    initial: ModelOrigin | None = None
    """None: the run began with weights drawn from its seed."""
    teacher: ModelOrigin | None = None


def weights_fingerprint(variables: Any) -> str:
    """SHA-256 of the names, shapes, dtypes and values of a tree of arrays.

    The same on every mesh and however the arrays lie on disk. All processes must ask for it.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        x = np.ascontiguousarray(on_host(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}\n".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def checkpoint_metadata(run: Any, provenance: Provenance, tokenizer: Path) -> dict[str, Any]:
    """JSON for each checkpoint of a run: its config, its provenance and its tokenizer."""
    extra = {KEY: dataclasses.asdict(provenance), TOKENIZER_KEY: tokenizer.read_bytes().decode()}
    return dataclasses.asdict(run) | extra


def read_provenance(run_dir: Path) -> Provenance | None:
    """Provenance by the newest checkpoint, before the first one by the folder; None for old runs.

    Raises:
      UserError: the folder's belongs to another run than the checkpoint.
    """
    in_folder = _read_file(run_dir / FILE)
    in_checkpoint = _read_checkpoint(run_dir / "checkpoints")
    if in_folder is None or in_checkpoint is None:
        return in_checkpoint or in_folder
    changed = provenance_differences(in_checkpoint, in_folder)
    require(
        not changed,
        f"{run_dir / FILE} is of another run than the newest checkpoint beside it "
        f"({'; '.join(changed)}): put back the one that was there, or move the file away",
    )
    return with_fingerprints_of(in_folder.corpus, in_checkpoint)


def with_fingerprints_of(corpus: CorpusFingerprints, known: Provenance) -> Provenance:
    """The provenance with these fingerprints where an earlier version kept none."""
    kept = {name: x for name, x in dataclasses.asdict(known.corpus).items() if x is not None}
    return dataclasses.replace(known, corpus=dataclasses.replace(corpus, **kept))


def checkpoint_tokenizer(checkpoints: Path) -> str | None:
    """The tokenizer.json inside the newest checkpoint; None where there is none."""
    step = latest_step(checkpoints)
    return None if step is None else read_metadata(checkpoints / str(step)).get(TOKENIZER_KEY)


def write_provenance(run_dir: Path, provenance: Provenance) -> None:
    """Writes provenance.json."""
    replace_text(run_dir / FILE, to_json(provenance))


def resume_provenance(run_dir: Path, stated: Provenance, corpus_dir: Path) -> Provenance | None:
    """Provenance of a run that goes on; None of one that was made before this was kept.

    Args:
      stated: what it is about to go on with; its initial weights count where it says some.
      corpus_dir: where its corpus lies.
    Raises:
      UserError: the two differ.
    """
    known = read_provenance(run_dir)
    if known is None:
        return None
    initial = stated.initial or known.initial
    stated = dataclasses.replace(stated, initial=initial, teacher=known.teacher)
    changed = provenance_differences(known, stated)
    is_corpus = bool(changed) and changed == _corpus_differences(known, stated)
    advice = (
        _corpus_advice(run_dir, corpus_dir)
        if is_corpus
        else "give what it was started with, or choose another --run-dir"
    )
    require(
        not changed,
        f"{run_dir} holds a run that was made from something else ({'; '.join(changed)}): {advice}",
    )
    return known


def _corpus_advice(run_dir: Path, corpus_dir: Path) -> str:
    """What to do about a corpus that was made anew from other text, or by another version."""
    source, folder = shlex.quote(str(run_dir)), shlex.quote(f"{corpus_dir}_2")
    return (
        f"put back the folder {corpus_dir} that it was trained on, for one made anew differs where "
        "its text has changed, or where a version of this program collects other files; or begin a "
        "new run with these weights and the text as it is now (--init.source "
        f"{source} --data.tokenizer {source} --data.directory {folder} --run-dir NEW)"
    )


def confirm_teacher(run_dir: Path, teacher: ModelOrigin) -> None:
    """Notes the teacher of a new run, or checks that a run which goes on has the same.

    Raises:
      UserError: it has another one.
    """
    known = read_provenance(run_dir)
    if known is None:
        return
    stated = dataclasses.replace(known, teacher=teacher)
    if known.teacher is None or latest_step(run_dir / "checkpoints") is None:
        write_provenance(run_dir, stated)
        return
    changed = provenance_differences(known, stated)
    require(
        not changed,
        f"{run_dir} holds a run with another teacher ({'; '.join(changed)}): give the teacher it "
        "was started with, or choose another --run-dir",
    )


def provenance_differences(before: Provenance, after: Provenance) -> list[str]:
    """Sentences naming what differs; a model under another name is the same if its weights are."""
    lines = []
    if before.objective != after.objective:
        lines.append(f"objective was {_verb(before)}, now {_verb(after)}")
    lines += _corpus_differences(before, after)
    for name, old, new in (
        ("initial weights", before.initial, after.initial),
        ("teacher", before.teacher, after.teacher),
    ):
        if _identity(old) != _identity(new):
            lines.append(f"{name}: was {old or 'none'}, now {new or 'none'}")
    return lines


def _corpus_differences(before: Provenance, after: Provenance) -> list[str]:
    """Sentences on the files whose fingerprints both have, and differ."""
    lines = []
    for field in dataclasses.fields(CorpusFingerprints):
        old, new = (getattr(x.corpus, field.name) for x in (before, after))
        if None not in (old, new) and old != new:
            name = field.name.replace("_", " ")
            lines.append(f"{name} had the SHA-256 {old[:8]}..., now {new[:8]}...")
    return lines


def _verb(provenance: Provenance) -> str:
    return f"{provenance.objective} ({VERBS[provenance.objective]})"


def _identity(model: ModelOrigin | None) -> tuple[Any, ...] | None:
    return None if model is None else (model.weights, model.settings)


def _read_file(path: Path) -> Provenance | None:
    if not path.exists():
        return None
    mend = "remove it where a checkpoint lies beside it, which holds the same, or start a new run"
    return read_record(Provenance, path, mend)


def _read_checkpoint(checkpoints: Path) -> Provenance | None:
    step = latest_step(checkpoints)
    if step is None:
        return None
    kept = read_metadata(checkpoints / str(step)).get(KEY)
    if kept is None:
        return None
    return from_json(Provenance, json.dumps(kept), where=f"{KEY} of {checkpoints / str(step)}")
