"""Token files, and rows of equal length cut from them.

A token file holds documents end to end, each behind an end-of-text token, as plain little-endian
integers to be memory-mapped (train.bin); a sidecar (train.json) says how to read them. Rows are cut
without regard to documents, so none of a row is wasted; positions restart at every document, which
is what keeps documents apart in the model (model/transformer.py).
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from tokenizers import Tokenizer

from configs.checks import UserError, require
from data.corpora import Document
from data.tokenizers.tokenizer import END_OF_TEXT_ID, end_of_text_id
from formats.small_files import UNLIMITED, read_record

FORMAT = 1
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What is known about a token file, kept as JSON beside it."""

    format: int
    dtype: str
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the documents."""
    tokenizer_sha256: str
    names: list[str]
    starts: list[int]
    """Index of each document's end-of-text token."""
    byte_counts: list[int]
    end_of_text_id: int = END_OF_TEXT_ID


def write_tokens(
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, tokenizer_sha256: str
) -> Sidecar:
    """Encodes the documents into path (.bin) and its sidecar (.json)."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    begin = end_of_text_id(tokenizer)
    names, starts, byte_counts, num_tokens = [], [], [], 0
    with path.open("wb") as file:
        for document in documents:
            ids = [begin, *tokenizer.encode(document.text).ids]
            file.write(np.asarray(ids, dtype).tobytes())  # tofile hides why a disk refuses
            names.append(document.name)
            starts.append(num_tokens)
            byte_counts.append(len(document.text.encode()))
            num_tokens += len(ids)
    sidecar = Sidecar(
        format=FORMAT,
        dtype=np.dtype(dtype).name,
        num_tokens=num_tokens,
        num_bytes=sum(byte_counts),
        tokenizer_sha256=tokenizer_sha256,
        names=names,
        starts=starts,
        byte_counts=byte_counts,
        end_of_text_id=begin,
    )
    path.with_suffix(".json").write_text(json.dumps(asdict(sidecar)))
    return sidecar


def _read_sidecar(path: Path, mend: str) -> Sidecar:
    """
    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or contradicts itself.
    """
    sidecar = read_record(Sidecar, path, mend, UNLIMITED)
    require(
        sidecar.format == FORMAT,
        f"{path} has format {sidecar.format}, this program reads {FORMAT}: {mend}",
    )
    require(
        sidecar.dtype in DTYPES,
        f"{path} has dtype {sidecar.dtype!r}, expected one of {', '.join(DTYPES)}: {mend}",
    )
    lengths = {len(x) for x in (sidecar.names, sidecar.starts, sidecar.byte_counts)}
    ends = [-1, *sidecar.starts, sidecar.num_tokens]
    require(
        len(lengths) == 1 and all(a < b for a, b in itertools.pairwise(ends)),
        f"{path} lists documents that don't lie one after the other: {mend}",
    )
    return sidecar


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

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped."""
        if self._tokens is None:
            self._tokens = np.memmap(self.path, self.dtype, mode="r")
        return self._tokens

    def documents(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """(name, int32 tokens with the leading end of text, bytes) of each document."""
        ends = [*self.sidecar.starts[1:], self.sidecar.num_tokens]
        columns = (self.sidecar.names, self.sidecar.starts, ends, self.sidecar.byte_counts)
        for name, start, end, num_bytes in zip(*columns, strict=True):
            yield name, np.asarray(self.tokens[start:end], np.int32), num_bytes

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tokens": None}


class PackedRows:
    """Random access to rows of seq_len inputs and their targets: the source of the pipeline."""

    def __init__(self, file: TokenFile, seq_len: int) -> None:
        """
        Raises:
          UserError: the file is too short for a single row.
        """
        self.file, self.seq_len = file, seq_len
        self.num_rows = (file.sidecar.num_tokens - 1) // seq_len
        if self.num_rows < 1:
            raise UserError(
                f"{file.path} has {file.sidecar.num_tokens} tokens, too few for one row of "
                f"data.seq_len={seq_len} and its targets: use a shorter row or a larger corpus"
            )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Row `index`: tokens and targets [L], positions [L], int32, and the row's own number."""
        row = int(index)
        start = row * self.seq_len
        window = np.asarray(self.file.tokens[start : start + self.seq_len + 1], np.int32)
        tokens, targets = window[:-1], window[1:]
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": document_positions(tokens, self.file.sidecar.end_of_text_id),
            "row": np.int32(row),
        }

    def __repr__(self) -> str:  # Grain compares it on restore
        return f"PackedRows({self.file.path.name}, {self.num_rows} rows of {self.seq_len})"


class StreamRows:
    """The rows of PackedRows in the order of streams: the source for models with memory.

    The file is cut into batch_size streams of as many whole rows each; what is left at its end is
    not read. Step s has row s of every stream, so row b of a batch goes on where row b of the batch
    before ended. Positions do so as well: a document that began in an earlier row keeps counting,
    and where a stream begins inside a document, they count from the stream's beginning.
    """

    def __init__(
        self, file: TokenFile, seq_len: int, batch_size: int, process_index: int, process_count: int
    ) -> None:
        """Each process has its own block of neighbouring streams, for as long as the run lasts.

        Raises:
          UserError: the file is too short for a row in each stream.
        """
        self.rows, self.batch_size = PackedRows(file, seq_len), batch_size
        self.stream_rows = len(self.rows) // batch_size
        if self.stream_rows < 1:
            raise UserError(
                f"{file.path} has {len(self.rows)} rows of data.seq_len={seq_len}, too few for "
                f"batch_size={batch_size} streams: use a smaller batch or a larger corpus"
            )
        self.own_streams = batch_size // process_count
        self.first_stream = process_index * self.own_streams
        self._starts = np.asarray(file.sidecar.starts)

    def __len__(self) -> int:
        return self.own_streams * self.stream_rows

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """As PackedRows, with positions that go on from row to row."""
        step, own = divmod(int(index), self.own_streams)
        stream_begin = (self.first_stream + own) * self.stream_rows
        row = self.rows[stream_begin + step]
        places_L = (stream_begin + step) * self.rows.seq_len + np.arange(self.rows.seq_len)
        starts_L = self._starts[np.searchsorted(self._starts, places_L, side="right") - 1]
        starts_L = np.maximum(starts_L, stream_begin * self.rows.seq_len)
        return {**row, "positions": (places_L - starts_L).astype(np.int32)}

    def __repr__(self) -> str:  # the same on every process
        return f"StreamRows({self.rows}, {self.batch_size} streams)"


def document_positions(tokens_L: np.ndarray, end_of_text_id: int) -> np.ndarray:
    """Each token's distance from the start of its document, or of the row."""
    places_L = np.arange(len(tokens_L), dtype=np.int32)
    starts_L = np.where(tokens_L == end_of_text_id, places_L, 0)
    return places_L - np.maximum.accumulate(starts_L)
