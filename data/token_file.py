"""Token files: documents end to end as plain little-endian integers, to be memory-mapped.

A sidecar says how to read them. Of text, each document stands behind an end-of-text token; of
chats, it is what the chat template writes, and nothing more. There are two forms:

1. train.bin and train.json, which lists the documents: for folders of text.
2. The same, with the list in train.documents, a table of fixed rows that is memory-mapped: for
   records, of which there are many. Chats have train.mask, too: a byte for each token, 1 where the
   loss counts it.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex, cast

import numpy as np
from tokenizers import Tokenizer

from configs.checks import UserError, require
from data.corpora import Document
from data.encoding import encoded
from data.tokenizers.tokenizer import END_OF_TEXT_ID, end_of_text_id
from formats.small_files import UNLIMITED, read_record

LISTED, TABLED = 1, 2
"""The two forms."""
DTYPES = ("uint16", "uint32")
DOCUMENT = np.dtype([("start", "<u8"), ("num_bytes", "<u8"), ("file", "<u8"), ("number", "<u8")])
"""A row of a table: first token, UTF-8 bytes, the file and the number of the record in it."""
LIST_FIELDS = ("names", "starts", "byte_counts")
TABLE_FIELDS = (
    "num_documents",
    "files",
    "parts",
    "has_loss_mask",
    "has_pairs",
    "documents_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The tokens of one source, which lie together."""

    name: str
    first_token: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What is known about a token file, kept as JSON beside it."""

    format: int
    dtype: str
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the documents."""
    tokenizer_sha256: str
    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Index of each document's first token."""
    byte_counts: list[int] = field(default_factory=list)
    end_of_text_id: int = END_OF_TEXT_ID
    num_documents: int = 0
    """In a table; so the fields that follow."""
    files: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    has_loss_mask: bool = False
    has_pairs: bool = False
    """Whether a document is a pair of conversations (data/preferences.py)."""
    documents_sha256: str = ""


def write_tokens(
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, tokenizer_sha256: str
) -> Sidecar:
    """Encodes the documents into path (.bin) and its sidecar (.json), which lists them."""
    dtype = token_dtype(tokenizer)
    begin = end_of_text_id(tokenizer)
    names, starts, byte_counts, num_tokens = [], [], [], 0
    with path.open("wb") as file:
        for document, ids in encoded(documents, tokenizer):
            # tofile hides why a disk refuses
            file.write(np.asarray([begin, *ids], dtype).tobytes())
            names.append(document.name)
            starts.append(num_tokens)
            byte_counts.append(len(document.text.encode()))
            num_tokens += 1 + len(ids)
    sidecar = Sidecar(
        format=LISTED,
        dtype=np.dtype(dtype).name,
        num_tokens=num_tokens,
        num_bytes=sum(byte_counts),
        tokenizer_sha256=tokenizer_sha256,
        names=names,
        starts=starts,
        byte_counts=byte_counts,
        end_of_text_id=begin,
    )
    write_sidecar(path.with_suffix(".json"), sidecar)
    return sidecar


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """That of the file which holds such a tokenizer's ids."""
    return np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Writes the fields that its form has."""
    others = TABLE_FIELDS if sidecar.format == LISTED else LIST_FIELDS
    tree = {name: value for name, value in asdict(sidecar).items() if name not in others}
    path.write_text(json.dumps(tree))


def _read_sidecar(path: Path, mend: str) -> Sidecar:
    """
    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or contradicts itself.
    """
    sidecar = read_record(Sidecar, path, mend, UNLIMITED)
    require(
        sidecar.format in (LISTED, TABLED),
        f"{path} has format {sidecar.format}, this program reads {LISTED} and {TABLED}: {mend}",
    )
    require(
        sidecar.dtype in DTYPES,
        f"{path} has dtype {sidecar.dtype!r}, expected one of {', '.join(DTYPES)}: {mend}",
    )
    if sidecar.format == TABLED:
        return _with_table(sidecar, path, mend)
    lengths = {len(x) for x in (sidecar.names, sidecar.starts, sidecar.byte_counts)}
    ends = [-1, *sidecar.starts, sidecar.num_tokens]
    require(
        len(lengths) == 1 and all(a < b for a, b in itertools.pairwise(ends)),
        f"{path} lists documents that don't lie one after the other: {mend}",
    )
    return sidecar


def _with_table(sidecar: Sidecar, path: Path, mend: str) -> Sidecar:
    """The sidecar with its table's columns in the place of the lists, read as they are asked for.

    Raises:
      UserError: a table or mask of another length.
    """
    expected = {documents_path(path): sidecar.num_documents * DOCUMENT.itemsize}
    if sidecar.has_loss_mask:
        expected[mask_path(path)] = sidecar.num_tokens
    for file, size in expected.items():
        found = file.stat().st_size
        require(found == size, f"{file} has {found} bytes, {path.name} promises {size}: {mend}")
    table = _Table(documents_path(path), sidecar.num_documents)
    columns = {
        "names": _Names(table, sidecar.files),
        "starts": _Column(table, "start"),
        "byte_counts": _Column(table, "num_bytes"),
    }
    return replace(sidecar, **cast(dict[str, Any], columns))


def documents_path(path: Path) -> Path:
    """The table of a token file, or of its sidecar."""
    return path.with_suffix(".documents")


def mask_path(path: Path) -> Path:
    """The loss mask of a token file, or of its sidecar."""
    return path.with_suffix(".mask")


@dataclass
class _Table:
    """Rows of DOCUMENT on the disk; opened lazily, so it can be sent to other processes."""

    path: Path
    num_rows: int
    _rows: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        if self._rows is None:
            is_empty = not self.num_rows
            self._rows = (
                np.zeros(0, DOCUMENT) if is_empty else np.memmap(self.path, DOCUMENT, mode="r")
            )
        return self._rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None}


@dataclass
class _Column(Sequence[int]):
    table: _Table
    name: str

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        found = self.table.rows[self.name][index]
        return found.tolist() if isinstance(found, np.ndarray) else int(found)

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, len(self), 1 << 16):
            yield from self[begin : begin + (1 << 16)]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.table.rows[self.name].astype(dtype or np.int64)


@dataclass
class _Names(Sequence[str]):
    """ "part.jsonl:17": the file and the number of the record in it."""

    table: _Table
    files: list[str]

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.table.rows[index]
        file, number = self.files[int(row["file"])], int(row["number"])
        return f"{file}:{number}" if number else file


class TokenFile:
    """A memory-mapped token file; opened lazily, so it can be sent to other processes."""

    def __init__(self, path: Path, advice: str | None = None) -> None:
        """Reads the sidecar and checks the file against it.

        Args:
          advice: ends the sentence of an error; None where the file's folder is a corpus.
        Raises:
          UserError: a missing, truncated or unreadable file or sidecar.
        """
        mend = advice or f"delete the folder {path.parent}, it will be made again"
        try:
            self.sidecar = _read_sidecar(path.with_suffix(".json"), mend)
            num_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: {mend}") from error
        self.path, self.dtype = path, np.dtype(self.sidecar.dtype)
        if num_bytes != self.sidecar.num_tokens * self.dtype.itemsize:
            raise UserError(
                f"{path} has {num_bytes} bytes, its sidecar promises {self.sidecar.num_tokens} "
                "tokens of "
                f"{self.dtype.itemsize} bytes: it was cut or changed; {mend}"
            )
        self._tokens: np.memmap | None = None
        self._mask: np.memmap | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, self.dtype, mode="r")
        return self._tokens

    @property
    def loss_mask(self) -> np.ndarray | None:
        """For each token of chats whether the loss counts it, uint8; None of text: all count."""
        if self._mask is None and self.sidecar.has_loss_mask:
            self._mask = np.memmap(mask_path(self.path), np.uint8, mode="r")
        return self._mask

    def bounds(self, document: SupportsIndex) -> tuple[int, int]:
        """Its first token, and the one after its last."""
        i, starts = int(document), self.sidecar.starts
        end = starts[i + 1] if i + 1 < len(starts) else self.sidecar.num_tokens
        return starts[i], end

    def documents(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """(name, int32 tokens with the leading end of text, bytes) of each document."""
        for i, (name, num_bytes) in enumerate(
            zip(self.sidecar.names, self.sidecar.byte_counts, strict=True)
        ):
            start, end = self.bounds(i)
            yield name, np.asarray(self.tokens[start:end], np.int32), num_bytes

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tokens": None, "_mask": None}
