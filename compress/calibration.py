"""Text that compression looks at: rows to calibrate on, and others to measure on.

B rows of a batch, L tokens of a row.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from checkpoint.run_directory import read_run
from configs.checks import UserError, require
from data.corpora import Document, list_source, name_hash
from infer.sources import Source
from model.step import Step, make_step

HELD_OUT = 0.2
"""Share of the documents that is measured on, by the hash of their names."""
ROWS = 4
"""Of a batch."""


@dataclass(frozen=True)
class Rows:
    """Packed documents, cut into rows."""

    tokens_NL: np.ndarray
    """int32."""
    positions_NL: np.ndarray
    """int32; a document begins at 0, and so does what a row holds of one that began before."""

    @property
    def num_tokens(self) -> int:
        return self.tokens_NL.size

    def steps(self, batch_size: int = ROWS) -> list[Step]:
        """The rows in batches; all of one size, what does not fill the last is left out."""
        size = min(batch_size, len(self.tokens_NL))
        starts = range(0, len(self.tokens_NL) - size + 1, size)
        parts = [
            [jnp.asarray(x_NL[i : i + size]) for x_NL in (self.tokens_NL, self.positions_NL)]
            for i in starts
        ]
        return [make_step(*part) for part in parts]


def targets_of(step: Step) -> np.ndarray:
    """The token after each, -1 where another document begins or the row ends; int32 [B, L]."""
    tokens_BL, positions_BL = np.asarray(step.tokens_BL), np.asarray(step.positions_BL)
    targets_BL = np.full_like(tokens_BL, -1)
    goes_on = positions_BL[:, 1:] == positions_BL[:, :-1] + 1
    targets_BL[:, :-1] = np.where(goes_on, tokens_BL[:, 1:], -1)
    return targets_BL


def read_rows(
    source: Source, text: str | None, *, calibration: int, held_out: int, length: int
) -> tuple[Rows, Rows]:
    """(rows to calibrate on, rows to measure on), of different documents.

    Args:
      text: a folder, a file or "stdlib"; None is what a run was trained on, and for other models
        this Python's library and the documentation of its language, by turns.
      calibration: tokens of the first.
      held_out: of the second.
      length: of a row; the model's context_length if that is less.
    Raises:
      UserError: too little text, or a model without a tokenizer.
    """
    tokenizer = source.tokenizer()
    length = min(length, source.config.context_length)
    is_run = source.kind == "run" and text is None
    share = read_run(source.path).data.holdout_fraction if is_run else HELD_OUT
    sides: tuple[list[Document], list[Document]] = ([], [])
    need = (8 * calibration, 8 * held_out)  # characters: a token has a few
    for document in _documents(source, text):
        side = int(name_hash(document.name) < share)
        if sum(len(d.text) for d in sides[side]) < need[side]:
            sides[side].append(document)
    made = []
    for documents, count, what in zip(
        sides, (calibration, held_out), ("calibration", "measuring"), strict=True
    ):
        tokens = (tokenizer.encode(document.text) for document in documents)
        rows = pack(tokens, count // length, length)
        require(
            len(rows.tokens_NL) > 0,
            f"the text for {what} has no {length} tokens: name more with --text",
        )
        made.append(rows)
    require(
        max(int(rows.tokens_NL.max()) for rows in made) < source.config.vocab_size,
        "the tokenizer has more tokens than the model: they are of two models",
    )
    return made[0], made[1]


def pack(documents: Iterator[Sequence[int]], count: int, length: int) -> Rows:
    """At most `count` rows of the documents one after the other."""
    tokens: list[int] = []
    positions: list[int] = []
    for ids in documents:
        if len(tokens) >= count * length:
            break
        tokens += ids
        positions += range(len(ids))
    count = min(count, len(tokens) // length)
    tokens_NL, positions_NL = (
        np.asarray(x[: count * length], np.int32).reshape(count, length)
        for x in (tokens, positions)
    )
    first_N1 = positions_NL[:, :1]
    begun = np.cumprod(positions_NL == first_N1 + np.arange(length), axis=1).astype(bool)
    return Rows(tokens_NL, np.where(begun, positions_NL - first_N1, positions_NL))


def _documents(source: Source, text: str | None) -> Iterator[Document]:
    if text is not None:
        files = list_source(text, "").files
        yield from (
            _parts(files[0].read()) if len(files) == 1 else (f.read() for f in _shuffled(files))
        )
    elif source.kind == "run":
        data = read_run(source.path).data
        require(
            data.form == "text" and not data.mixture and data.text_field is None,
            f"{source.name} was trained on a mixture, records or chats: name the text to calibrate "
            "on with --text",
        )
        yield from (file.read() for file in _shuffled(list_source(data.source, data.suffix).files))
    else:
        code = (file.read() for file in _shuffled(list_source("stdlib", ".py").files))
        for pair in itertools.zip_longest(code, _prose()):
            yield from (document for document in pair if document is not None)


def _parts(document: Document) -> Iterator[Document]:
    """A single file as several documents."""
    size = max(len(document.text) // 20, 1)
    for i in range(0, len(document.text), size):
        yield Document(f"{document.name} {i // size}", document.text[i : i + size])


def _shuffled(files: list, key: Callable = lambda file: name_hash(file.name[::-1])) -> list:
    """By another hash than the one that holds out."""
    return sorted(files, key=key)


def _prose() -> list[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(
            "this Python has no documentation (pydoc_data.topics): name a text with --text"
        ) from error
    return _shuffled([Document(name, text) for name, text in topics.items()])
