"""Inventory of a corpus: files read and left out, tokens, changes of its source since."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from configs.base import RunConfig
from configs.checks import UserError
from data.corpora import BEGINNING, END, document_name, shown_reasons, source_path, source_sizes
from data.pipeline import Corpus


class Changes(NamedTuple):
    """Files of a source against the corpus that was made of it, by number."""

    added: int
    gone: int
    resized: int


def inventory(corpus: Corpus, run: RunConfig) -> Iterator[str]:
    """Sentences about the text that a run reads: how much there is, and what of it is missing."""
    training, held_out = corpus.training().sidecar, corpus.held_out().sidecar
    left_out = corpus.left_out()
    missing = f", {len(left_out)} left out ({shown_reasons(left_out)})" if left_out else ""
    is_file = training.names[0].endswith(BEGINNING)
    files = 1 if is_file else len(training.names) + len(held_out.names)
    epochs = run.steps * run.tokens_per_step / training.num_tokens
    counted = f"{files:,} file{'s' if files > 1 else ''}{missing}"
    shown = f"{epochs:.1f}" if epochs >= 0.95 else f"{epochs:.2g}"
    yield (
        f"{corpus.directory}: {counted}, {training.num_tokens:,} tokens to train on, "
        f"{shown} epochs; {held_out.num_tokens:,} held out"
    )
    try:
        changed = changes(corpus, run.data.source, run.data.suffix)
    except UserError:
        yield f"{run.data.source} is no longer there: the corpus is what was made of it"
        return
    by_change = {"added": changed.added, "gone": changed.gone, "of another size": changed.resized}
    if any(by_change.values()):
        counts = ", ".join(f"{count} {what}" for what, count in by_change.items() if count)
        yield (
            f"{run.data.source} has changed since (files {counts}), the corpus has not: for a new "
            "one set --data.directory to another folder"
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
