"""From a corpus on disk to an endless, resumable stream of batches."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np
from tokenizers import Tokenizer

from configs.base import DataConfig
from configs.checks import UserError, require
from configs.data import MixturePhase
from data.corpora import (
    Document,
    LeftOut,
    TextFile,
    list_source,
    name_hash,
    source_path,
    split,
    split_lines,
)
from data.corpus_settings import (
    CorpusSettings,
    check_settings,
    read_settings,
    write_settings,
)
from data.locks import wait_for_lock
from data.mixture_rows import MAX_EPOCHS, mixed_rows, rows_of_sources
from data.packing import StreamRows, packed_rows
from data.preferences import rows_of_pairs
from data.sources import is_streamed, sizes_of
from data.streamed import StreamedBuild
from data.token_file import TokenFile, write_tokens
from data.tokenizers.tokenizer import (
    check_vocabulary,
    fingerprint,
    load_tokenizer,
    plain,
    train_tokenizer,
)
from data.tokenizers.tokenizer_export import write_tokenizer_config
from data.tokenizers.tokenizer_sources import load_public_tokenizer, open_public_tokenizer

if TYPE_CHECKING:  # with Orbax it takes 0.2 s, which who trains nothing need not wait for
    import grain

Batch = dict[str, np.ndarray]


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
        left_out = self.settings().left_out
        return None if left_out is None else [LeftOut(*pair) for pair in left_out]

    def settings(self) -> CorpusSettings:
        """What it was made with and of."""
        return read_settings(self.directory)

    def tokenizer(self) -> Tokenizer:
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
            _build_beside(directory, config, vocab_size)
    return open_corpus(config, vocab_size)


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """The corpus in config.directory, which must be there: nothing is made.

    Raises:
      UserError: there is none, or it was made with other settings.
    """
    directory = Path(config.directory)
    require(directory.exists(), f"the corpus {directory} is not there")
    check_settings(directory, config, vocab_size, Corpus(directory).tokenizer_path)
    return Corpus(directory)


def _build_beside(directory: Path, config: DataConfig, vocab_size: int) -> None:
    """Makes the corpus under another name and renames it. Of one that is made as its sources are
    read, what a stopped process has left is gone on with; anything else begins afresh.
    """
    building = directory.with_name(f"{directory.name}.building")
    is_plain = not (config.is_mixed or config.infill_rate or config.max_similarity)
    if not is_plain or any(is_streamed(part, config.form) for part in config.parts):
        building.mkdir(parents=True, exist_ok=True)
        _build_streamed(building, config, vocab_size)
        building.rename(directory)
        return
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        _build(building, config, vocab_size)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(directory: Path, config: DataConfig, vocab_size: int) -> None:
    """Makes the corpus of a folder of text, or of one text file."""
    files, left_out = list_source(config.source, config.suffix)
    if source_path(config.source).is_file():
        parts = split_lines([file.read() for file in files], config.holdout_fraction)
        training, held_out = parts
    else:
        kept, apart = split(files, config.holdout_fraction)
        kept.sort(key=lambda file: name_hash("order of " + file.name))
        training, held_out = _Texts(kept), _Texts(apart)
    corpus = Corpus(directory)
    if config.tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in training), vocab_size)
    else:
        tokenizer = plain(load_public_tokenizer(config.tokenizer))
        check_vocabulary(tokenizer, vocab_size, config.tokenizer)
    tokenizer.save(str(corpus.tokenizer_path))
    tokenizer, sha256 = corpus.tokenizer(), fingerprint(corpus.tokenizer_path)
    write_tokens(directory / "train.bin", training, tokenizer, sha256)
    write_tokens(directory / "held_out.bin", held_out, tokenizer, sha256)
    write_settings(directory, config, vocab_size, sha256, left_out, {})


def _build_streamed(directory: Path, config: DataConfig, vocab_size: int) -> None:
    """Makes the corpus of records, tokens, chats, or several sources."""
    require(
        config.form == "text" or config.tokenizer is not None,
        f"data.form={config.form!r} needs a data.tokenizer with a chat template: name that of the "
        "model that is trained further",
    )
    public = None if config.tokenizer is None else open_public_tokenizer(config.tokenizer)
    sizes = sizes_of(config)
    build = StreamedBuild(directory, config, vocab_size, public)
    path = Corpus(directory).tokenizer_path
    if public is not None or not build.has_begun():
        tokenizer = plain(build.make_tokenizer())
        check_vocabulary(tokenizer, vocab_size, config.tokenizer or "the corpus's own")
        tokenizer.save(str(path))
    if config.form != "text":
        assert public is not None, "the config demands one"
        write_tokenizer_config(directory, public)
    num_empty = build.write(Corpus(directory).tokenizer(), path)
    empty = [LeftOut(f"{num_empty:,} records", "empty")] if num_empty else []
    left_out = [*build.left_out, *empty]
    write_settings(directory, config, vocab_size, fingerprint(path), left_out, sizes)


@dataclass(frozen=True)
class _Texts:
    """The documents of files, each read when it comes to it; as often as asked for."""

    files: list[TextFile]

    def __iter__(self) -> Iterator[Document]:
        return (file.read() for file in self.files)


def batches(
    file: TokenFile,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    order: Literal["shuffled", "streams"] = "shuffled",
    phases: Sequence[MixturePhase] = (),
    rows_before: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """Endless batches of rows: every row once per epoch.

    Shuffled: in an order drawn anew each epoch. Step s takes rows [s * batch_size, (s + 1) *
    batch_size) of the shuffled rows. Streams: see StreamRows; an epoch's end leads back to the
    beginning of every stream. Either way each process takes its block of neighbouring rows of the
    batch, so that the global batches, and the order in them, do not depend on the number of
    processes. The iterator's state (a step count, the same on all) belongs into the checkpoint.

    Args:
      batch_size: rows of the global batch.
      seed: of the shuffled order; streams have only one.
      phases: of a mixture, whose sources are the parts of the file: of any n rows of a phase in a
        row each part has its share to within a row or two, and its own rows are shuffled anew each
        time they are through. The first of phases begins with the order.
      rows_before: rows of that order that are left out at its beginning; of streams, whole batches.
      process_index: of the block; processes with the same rows have the same one.
      process_count: blocks that a batch is cut into.
    Returns:
      Iterator of {"tokens", "targets", "positions": int32 [B / process_count, L], "row": int32}.
    Raises:
      UserError: batch_size that the processes do not divide.
    """
    import grain

    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} must be divisible by the {process_count} processes"
        )
    own_rows = batch_size // process_count
    has_pairs = file.sidecar.has_pairs
    unit = 2 if has_pairs else 1  # rows of an item of the source
    if own_rows % unit:
        raise UserError(
            f"batch_size={batch_size} gives each of {process_count} processes {own_rows} rows, and "
            "a pair is two of them: make it even"
        )
    if order == "streams":
        streams = StreamRows(file, seq_len, batch_size, process_index, process_count)
        rows = grain.MapDataset.source(streams).repeat(MAX_EPOCHS)
        blocks = rows[rows_before // process_count :].batch(own_rows)
    elif order == "shuffled":
        per_step = batch_size // unit
        rows = (
            mixed_rows(rows_of_sources(file, seq_len), seed, phases, per_step)
            if phases
            else _shuffled(file, seq_len, seed)
        )
        blocks = rows[rows_before // unit :].batch(own_rows // unit)
        blocks = blocks[process_index::process_count]
        if has_pairs:
            blocks = blocks.map(rows_of_pairs)
    else:
        assert_never(order)
    return iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _shuffled(file: TokenFile, seq_len: int, seed: int) -> "grain.MapDataset":
    import grain

    rows = grain.MapDataset.source(packed_rows(file, seq_len))
    return rows.seed(seed).shuffle().repeat(MAX_EPOCHS)
