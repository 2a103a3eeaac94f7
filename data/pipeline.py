"""From a corpus on disk to an endless, resumable stream of batches."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, assert_never

import grain
import numpy as np

from configs.base import DataConfig
from configs.checks import UserError, require
from data.corpora import LeftOut, name_hash, read_source, source_path, split, split_lines
from data.locks import wait_for_lock
from data.packing import PackedRows, StreamRows, TokenFile, write_tokens
from data.tokenizers.tokenizer import (
    check_vocabulary,
    fingerprint,
    load_tokenizer,
    plain,
    train_tokenizer,
)
from data.tokenizers.tokenizer_sources import load_public_tokenizer
from formats.small_files import read_record

Batch = dict[str, np.ndarray]

SETTINGS = "corpus.json"

MAX_EPOCHS = 1_000_000  # an endless repeat overflows the length of Grain's prefetch


@dataclass(frozen=True, kw_only=True)
class CorpusFingerprints:
    """SHA-256 of each file of a corpus that a run's numbers depend on."""

    tokenizer: str
    training_tokens: str
    held_out_tokens: str
    held_out_documents: str | None = None
    """Of their sidecar, which says where documents begin and of how many bytes they are; None in
    runs made before it was kept, and then not compared."""
    token_counts: str | None = None
    """Of what the run keeps of the training text (checkpoint/run_corpus.py); None likewise, and of
    a corpus, which has none."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What a corpus was made with and of, as its corpus.json has it."""

    source: str
    suffix: str
    holdout_fraction: float
    vocab_size: int
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    left_out: list[list[str]] | None = None
    """Pairs of a file and why it could not be read; None in a corpus of before that was noted."""


@dataclass(frozen=True)
class Corpus:
    """A prepared folder: tokenizer.json, train.bin, held_out.bin and their sidecars."""

    directory: Path

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.json"

    def training(self) -> TokenFile:
        return TokenFile(self.directory / "train.bin")

    def held_out(self) -> TokenFile:
        return TokenFile(self.directory / "held_out.bin")

    def left_out(self) -> list[LeftOut] | None:
        """Files of the source that could not be read when the corpus was made; None in a corpus of
        before that was noted.
        """
        left_out = _read_settings(self.directory).left_out
        return None if left_out is None else [LeftOut(*pair) for pair in left_out]

    def tokenizer(self):
        return load_tokenizer(self.tokenizer_path)

    def fingerprints(self) -> CorpusFingerprints:
        """Fingerprints of the files as they are now, read whole.

        Raises:
          UserError: one is missing or damaged.
        """
        self.tokenizer()
        return CorpusFingerprints(
            tokenizer=fingerprint(self.tokenizer_path),
            training_tokens=fingerprint(self.training().path),
            held_out_tokens=fingerprint(self.held_out().path),
            held_out_documents=fingerprint(self.held_out().path.with_suffix(".json")),
        )


def prepare_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """The corpus in config.directory, made from config.source if it is not there yet.

    It is built under another name and then renamed, so an interrupted build leaves nothing behind
    that looks whole. Of several processes that want it at once one builds, the others wait.

    Raises:
      UserError: the folder holds a corpus made with other settings, the source has no text, or
        config.tokenizer can't be read or has more tokens than vocab_size.
    """
    directory = Path(config.directory)
    if directory.exists():
        return open_corpus(config, vocab_size)
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.with_name(f"{directory.name}.lock")
    with wait_for_lock(lock, f"waiting for another process, which makes the corpus {directory}"):
        if not directory.exists():
            _build_beside(directory, _settings(config, vocab_size))
    return open_corpus(config, vocab_size)


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """The corpus in config.directory, which must be there: nothing is made.

    Raises:
      UserError: there is none, or it was made with other settings.
    """
    directory = Path(config.directory)
    require(directory.exists(), f"the corpus {directory} is not there")
    _check_settings(directory, _settings(config, vocab_size))
    return Corpus(directory)


def _settings(config: DataConfig, vocab_size: int) -> dict[str, object]:
    """Settings that a corpus is made with, as its corpus.json lists them."""
    return {
        "source": config.source,
        "suffix": config.suffix,
        "holdout_fraction": config.holdout_fraction,
        "vocab_size": vocab_size,
        "tokenizer": config.tokenizer,
    }


def _build_beside(directory: Path, settings: dict[str, Any]) -> None:
    """Makes the corpus under another name, which a killed process may have left, and renames it."""
    building = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        _build(building, settings)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_settings(directory: Path, settings: dict[str, object]) -> None:
    found = _read_settings(directory)
    for name, wanted in settings.items():
        made_with = getattr(found, name)
        if _plain(name, made_with) != wanted:
            raise UserError(
                f"the corpus in {directory} was made with {name}={made_with!r}, this run asks for "
                f"{wanted!r}: set --data.directory to another folder"
            )
    path = Corpus(directory).tokenizer_path
    if path.exists() and found.tokenizer_sha256 not in (None, fingerprint(path)):
        raise UserError(
            f"{path} is not the tokenizer that the token files beside it were made with: delete "
            f"the folder {directory}, it will be made again"
        )


def _read_settings(directory: Path) -> CorpusSettings:
    mend = f"delete {directory}, it will be made again, or set --data.directory"
    try:
        found = read_record(CorpusSettings, directory / SETTINGS, mend)
    except FileNotFoundError as error:
        raise UserError(f"{directory} is there but holds no corpus ({error}): {mend}") from error
    require(
        all(len(pair) == 2 for pair in found.left_out or ()),
        f"{directory / SETTINGS} has a left_out that is no list of files and reasons: {mend}",
    )
    return found


def _plain(name: str, value: object) -> object:
    """A setting as configs spell it today: "text/" is the folder "text"."""
    if name in ("source", "tokenizer") and isinstance(value, str):
        return str(PurePath(value))
    return value


def _build(directory: Path, settings: dict[str, Any]) -> None:
    documents, left_out = read_source(settings["source"], settings["suffix"])
    is_file = source_path(settings["source"]).is_file()
    training, held_out = (split_lines if is_file else split)(
        documents, settings["holdout_fraction"]
    )
    training.sort(key=lambda document: name_hash("order of " + document.name))
    corpus, name, vocab_size = Corpus(directory), settings["tokenizer"], settings["vocab_size"]
    if name is None:
        tokenizer = train_tokenizer((d.text for d in training), vocab_size)
    else:
        tokenizer = plain(load_public_tokenizer(name))
        check_vocabulary(tokenizer, vocab_size, name)
    tokenizer.save(str(corpus.tokenizer_path))
    tokenizer, sha256 = corpus.tokenizer(), fingerprint(corpus.tokenizer_path)
    write_tokens(directory / "train.bin", training, tokenizer, sha256)
    write_tokens(directory / "held_out.bin", held_out, tokenizer, sha256)
    (directory / SETTINGS).write_text(
        json.dumps(settings | {"tokenizer_sha256": sha256, "left_out": left_out})
    )


def batches(
    file: TokenFile,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    order: Literal["shuffled", "streams"] = "shuffled",
    rows_before: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of rows: every row once per epoch.

    Shuffled: in an order drawn anew each epoch. Step s takes rows [s * batch_size, (s + 1) *
    batch_size) of the shuffled rows. Streams: see StreamRows; an epoch's end leads back to the
    beginning of every stream. Either way each process takes its block of neighbouring rows of the
    batch, so that the global batches, and the order in them, do not depend on the number of
    processes. The iterator's state (a step count, the same on all) belongs into the checkpoint.

    Args:
      batch_size: rows of the global batch.
      seed: of the shuffled order; streams have only one.
      rows_before: rows of that order that are left out at its beginning; of streams, whole batches.
      process_index: of the block; processes with the same rows have the same one.
      process_count: blocks that a batch is cut into.
    Returns:
      Iterator of {"tokens", "targets", "positions": int32 [B / process_count, L], "row": int32}.
    Raises:
      UserError: batch_size that the processes do not divide.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} must be divisible by the {process_count} processes"
        )
    own_rows = batch_size // process_count
    if order == "streams":
        streams = StreamRows(file, seq_len, batch_size, process_index, process_count)
        rows = grain.MapDataset.source(streams).repeat(MAX_EPOCHS)
        blocks = rows[rows_before // process_count :].batch(own_rows)
    elif order == "shuffled":
        rows = grain.MapDataset.source(PackedRows(file, seq_len)).seed(seed).shuffle()
        blocks = rows.repeat(MAX_EPOCHS)[rows_before:].batch(own_rows)
        blocks = blocks[process_index::process_count]
    else:
        assert_never(order)
    return iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
