"""Rows of equal length cut from token files.

Rows of text are cut without regard to documents, so none of a row is wasted; positions restart at
every document, which is what keeps documents apart in the model (model/transformer.py).
"""

from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from configs.checks import UserError, require
from data.packed_chats import PackedChats
from data.preferences import PreferencePairs
from data.token_file import TokenFile


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

    def parts(self) -> list["PartRows"]:
        """The rows of each source of a mixture, without those that two sources share.

        Raises:
          UserError: a source is too short for a single row.
        """
        found = []
        for part in self.file.sidecar.parts:
            first = -(-part.first_token // self.seq_len)
            end = (part.first_token + part.num_tokens - 1) // self.seq_len
            if not part.num_tokens:  # held out whole
                continue
            require(
                end > first,
                f"{part.name} has {part.num_tokens:,} tokens to train on, too few for a row of "
                f"data.seq_len={self.seq_len} in a mixture: use a shorter row, or leave it out",
            )
            found.append(PartRows(self, first, end - first))
        return found

    def __repr__(self) -> str:  # Grain compares it on restore
        return f"PackedRows({self.file.path.name}, {self.num_rows} rows of {self.seq_len})"


def packed_rows(file: TokenFile, seq_len: int) -> "PackedRows | PackedChats | PreferencePairs":
    """The rows of a file: of whole chats, pairs of rows, or of text, which is cut anywhere.

    Raises:
      UserError: the file is too short for a single row.
    """
    if file.sidecar.has_pairs:
        return PreferencePairs(file, seq_len)
    of_chats = file.sidecar.has_loss_mask
    return PackedChats(file, seq_len) if of_chats else PackedRows(file, seq_len)


@dataclass(frozen=True)
class PartRows:
    """Neighbouring rows of a file."""

    rows: PackedRows
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """As PackedRows."""
        return self.rows[self.first + int(index)]


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
