"""Inventory of a corpus: files read and left out, tokens, changes of its source since."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from configs.base import DataConfig, RunConfig
from configs.checks import UserError
from data.corpora import BEGINNING, END, document_name, shown_reasons, source_path, source_sizes
from data.mixture_rows import rows_of_sources
from data.packed_chats import PackedChats
from data.packing import packed_rows
from data.pipeline import Corpus
from data.preferences import PreferencePairs
from data.sources import sizes_of
from data.token_file import LISTED, TokenFile


class Changes(NamedTuple):
    """Files of a source against the corpus that was made of it, by number."""

    added: int
    gone: int
    resized: int


def inventory(corpus: Corpus, run: RunConfig) -> Iterator[str]:
    """Sentences about the text that a run reads: how much there is, and what of it is missing."""
    file = corpus.training()
    training, held_out = file.sidecar, corpus.held_out().sidecar
    left_out = corpus.left_out()
    missing = f", {len(left_out)} left out ({shown_reasons(left_out)})" if left_out else ""
    is_file = training.names[0].endswith(BEGINNING)
    files = 1 if is_file else len(training.names) + len(held_out.names)
    what = "file" if training.format == LISTED else "document"
    epochs = run.steps * run.tokens_per_step / training.num_tokens
    chats = packed_rows(file, run.data.seq_len) if training.has_loss_mask else None
    if chats is not None:
        rows = len(chats) * (2 if training.has_pairs else 1)
        epochs = run.steps * run.batch_size / rows
    counted = f"{files:,} {what}{'s' if files > 1 else ''}{missing}"
    shown = _epochs_shown(epochs)
    yield (
        f"{corpus.directory}: {counted}, {training.num_tokens:,} tokens to train on, "
        f"{shown} epochs; {held_out.num_tokens:,} held out"
    )
    if isinstance(chats, PackedChats | PreferencePairs):
        yield f"  {chats.describe()}"
    if run.data.order == "streams":
        unread = len(packed_rows(file, run.data.seq_len)) % run.batch_size
        if unread:
            yield f"  the last {unread:,} rows are not read: they do not divide into the streams"
    yield from _shares(file, run)
    name = "one of its sources" if run.data.is_mixed else run.data.source
    try:
        changed = _changes(corpus, run.data)
    except UserError:
        yield f"{name} is no longer there: the corpus is what was made of it"
        return
    by_change = {"added": changed.added, "gone": changed.gone, "of another size": changed.resized}
    if any(by_change.values()):
        counts = ", ".join(f"{count} {what}" for what, count in by_change.items() if count)
        yield (
            f"{name} has changed since (files {counts}), the corpus has not: for a new "
            "one set --data.directory to another folder"
        )


def _shares(file: TokenFile, run: RunConfig) -> Iterator[str]:
    """Of a mixture, each source's share of the rows, and how often its own are read."""
    if not run.data.mixture:
        return
    phases, unit = run.data.phases, 2 if file.sidecar.has_pairs else 1
    begins = [min(phase.first_step, run.steps) for phase in phases]
    steps = np.diff([*begins, run.steps])
    rows_P = steps @ [phase.shares for phase in phases] * run.batch_size / unit
    parts = rows_of_sources(file, run.data.seq_len)
    for i, (part, own) in enumerate(zip(run.data.mixture, parts, strict=True)):
        shares = [f"{phases[0].shares[i]:.1%}"]
        for before, phase in itertools.pairwise(phases):
            if phase.shares[i] != before.shares[i]:
                shares.append(f"{phase.shares[i]:.1%} after {phase.first_step:,} steps")
        epochs = _epochs_shown(rows_P[i] / len(own))
        yield f"  {', '.join(shares)} {part.source}: {len(own):,} rows, {epochs} epochs"


def _epochs_shown(epochs: float) -> str:
    return f"{epochs:.1f}" if epochs >= 0.95 else f"{epochs:.2g}"


def _changes(corpus: Corpus, data: DataConfig) -> Changes:
    """As `changes`; of records and mixtures by what the corpus notes of its files.

    Raises:
      UserError: a source is gone.
    """
    made = corpus.settings().sizes
    if not made:
        return changes(corpus, data.source, data.suffix)
    now = sizes_of(data)
    return Changes(
        added=len(now.keys() - made.keys()),
        gone=len(made.keys() - now.keys()),
        resized=sum(made[name] != now[name] for name in made.keys() & now.keys()),
    )


def changes(corpus: Corpus, source: str, suffix: str) -> Changes:
    """What a look at the source's names and sizes shows; no file is read.

    Raises:
      UserError: the source is gone.
    """
    made: Counter[str] = Counter()
    is_file = source_path(source).is_file()
    for sidecar in (corpus.training().sidecar, corpus.held_out().sidecar):
        for name, size in zip(sidecar.names, sidecar.byte_counts, strict=True):
            made[name.removesuffix(BEGINNING).removesuffix(END) if is_file else name] += size
    now = source_sizes(source, suffix)
    left_out = corpus.left_out()
    for path, _ in left_out or ():
        now.pop(document_name(path), None)
    shared = made.keys() & now.keys()
    return Changes(
        added=0 if left_out is None else len(now.keys() - made.keys()),
        gone=len(made.keys() - now.keys()),
        resized=sum(made[name] != now[name] for name in shared),
    )
