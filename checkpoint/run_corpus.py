"""The part of its corpus that a run keeps: enough to generate and to be evaluated without it.

The run's folder holds tokenizer.json, the held-out tokens (held_out.bin and its sidecar) and how
often each token occurs in the training text (token_counts.npy). Reading them makes nothing; runs
made before they were kept are read with the corpus that their config names, where it is there.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from checkpoint.provenance import checkpoint_tokenizer, read_provenance
from configs.base import RunConfig
from configs.checks import UserError, require
from data.pipeline import Corpus, CorpusFingerprints, open_corpus
from data.token_file import TokenFile, documents_path, mask_path
from data.tokenizers.special_tokens import GENERATION_CONFIG, TOKENIZER_CONFIG
from data.tokenizers.tokenizer import fingerprint, load_tokenizer, num_ids, parse_tokenizer

TOKEN_COUNTS = "token_counts.npy"
COUNTED_AT_ONCE = 1 << 24
AGAIN = "start the command that trained the run again, which copies it from the corpus"


@dataclass(frozen=True)
class RunCorpus:
    """Tokenizer, held-out tokens and token counts of one run."""

    tokenizer: Tokenizer
    held_out: TokenFile
    token_counts_V: np.ndarray
    """Occurrences of each token in the training text, int64."""


def keep_corpus(corpus: Corpus, run_dir: Path, known: CorpusFingerprints | None) -> str:
    """Copies into the run's folder what it keeps; returns the fingerprint of the token counts.

    Args:
      known: of a run that goes on with this corpus; what the folder has by then stays.
    """
    beside = [corpus.directory / name for name in (TOKENIZER_CONFIG, GENERATION_CONFIG)]
    kept = [x for x in beside if x.exists()]
    for source in (corpus.tokenizer_path, *kept, *_held_out_files(corpus.directory)):
        target = run_dir / source.name
        if not target.exists() or fingerprint(target) != fingerprint(source):
            shutil.copyfile(source, _unfinished(target))
            os.replace(_unfinished(target), target)
    counts, before = run_dir / TOKEN_COUNTS, known.token_counts if known else None
    if before is None or not counts.exists() or fingerprint(counts) != before:
        with _unfinished(counts).open("wb") as file:
            np.save(file, count_tokens(corpus.training(), num_ids(corpus.tokenizer())))
        os.replace(_unfinished(counts), counts)
    return fingerprint(counts)


def count_tokens(file: TokenFile, vocab_size: int) -> np.ndarray:
    """Occurrences of each token, int64 [V]."""
    counts_V = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(file.tokens), COUNTED_AT_ONCE):
        part = file.tokens[begin : begin + COUNTED_AT_ONCE]
        counts_V += np.bincount(part, minlength=vocab_size)
    return counts_V


def read_run_tokenizer(run: RunConfig, run_dir: Path) -> Tokenizer:
    """The tokenizer that the run was trained with.

    Raises:
      UserError: the folder's is another one, or the run keeps none and its corpus is gone.
    """
    provenance = read_provenance(run_dir)
    if provenance is None:
        return _old_corpus(run, run_dir).tokenizer()
    path = run_dir / "tokenizer.json"
    if path.exists():
        _check(path, provenance.corpus.tokenizer)
        return load_tokenizer(path)
    text = checkpoint_tokenizer(run_dir / "checkpoints")
    if text is None:
        raise UserError(f"{path} is missing, and no checkpoint holds it: {AGAIN}")
    return parse_tokenizer(text, f"the tokenizer in the newest checkpoint of {run_dir}", AGAIN)


def open_run_corpus(run: RunConfig, run_dir: Path) -> RunCorpus:
    """The kept part of a run's corpus.

    Raises:
      UserError: as `read_run_tokenizer`; held-out tokens that are missing, damaged or others.
    """
    provenance = read_provenance(run_dir)
    if provenance is None:
        corpus = _old_corpus(run, run_dir)
        tokenizer = corpus.tokenizer()
        counts_V = count_tokens(corpus.training(), num_ids(tokenizer))
        return RunCorpus(tokenizer, corpus.held_out(), counts_V)
    tokenizer, known = read_run_tokenizer(run, run_dir), provenance.corpus
    held_out = TokenFile(run_dir / "held_out.bin", advice=AGAIN)
    _check(held_out.path, known.held_out_tokens)
    sidecar = held_out.path.with_suffix(".json")
    _check(sidecar, known.held_out_documents)
    require(
        held_out.sidecar.tokenizer_sha256 == known.tokenizer,
        f"{sidecar} is of text in another tokenizer's tokens than the run's: remove it, and "
        f"{AGAIN}",
    )
    counts_V = _read_counts(run_dir / TOKEN_COUNTS, known.token_counts, num_ids(tokenizer))
    return RunCorpus(tokenizer, held_out, counts_V)


def _read_counts(path: Path, known: str | None, vocab_size: int) -> np.ndarray:
    """Token counts, int64 [V].

    Raises:
      UserError: they are missing, damaged, or another run's.
    """
    require(path.is_file(), f"{path} is missing: {AGAIN}")
    _check(path, known)
    try:
        counts_V = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and {AGAIN}") from error
    is_counts = isinstance(counts_V, np.ndarray) and counts_V.dtype == np.int64
    require(
        is_counts and counts_V.shape == (vocab_size,),
        f"{path} does not hold a count for each of the {vocab_size} tokens of the run's tokenizer: "
        f"remove it, and {AGAIN}",
    )
    return counts_V


def _held_out_files(directory: Path) -> list[Path]:
    path = directory / "held_out.bin"
    tables = [x for x in (documents_path(path), mask_path(path)) if x.exists()]
    return [path, path.with_suffix(".json"), *tables]


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _check(path: Path, known: str | None) -> None:
    """Compares a kept file with its fingerprint, where one is known."""
    if known is None:
        return
    require(path.is_file(), f"{path} is no plain file: remove it, and {AGAIN}")
    found = fingerprint(path)
    require(
        found == known,
        f"{path} is not what the run was trained with: its SHA-256 was {known[:8]}..., now it is "
        f"{found[:8]}...: remove it, and {AGAIN}",
    )


def _old_corpus(run: RunConfig, run_dir: Path) -> Corpus:
    """The corpus that the config names, of a run without fingerprints.

    Raises:
      UserError: it is gone, or was made with other settings.
    """
    print(
        f"note: {run_dir} was made before runs kept fingerprints and their tokenizer: the corpus "
        f"{run.data.directory} is taken as it is now",
        file=sys.stderr,
        flush=True,
    )
    try:
        return open_corpus(run.data, run.model.vocab_size)
    except UserError as error:
        raise UserError(
            f"{run_dir} keeps no tokenizer, as it was made before runs did, and {error}: put the "
            "corpus back from where the run was trained; one made anew may have another tokenizer"
        ) from error
