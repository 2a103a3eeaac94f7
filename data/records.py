"""Files of records, one after the other: jsonl (also packed by gzip or zstd), parquet, arrow.

A record is a dict of what JSON has. A file's records are numbered from 1: of jsonl the numbers are
those of its lines. Reading holds a few thousand records at most.
"""

import contextlib
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.checks import UserError, require

Record = dict[str, Any]
Records = Iterator[tuple[int, Record]]
"""Numbers and records."""
TOOLS = "tools"
"""A chat's functions: read where a record has any, whatever else is asked for."""
ROWS_AT_ONCE = 256
PACKED_AT_ONCE = 1 << 14
INSTALL = "pip install 'moesaic[data]' or pip install {}"


def read_jsonl(path: Path, fields: tuple[str, ...], skip: int = 0) -> Records:
    """Objects of JSON, one in a line; empty lines are passed over.

    Args:
      fields: that each must have.
      skip: lines to pass over without a look at them.
    Raises:
      UserError: a line that is no object or lacks a field, or a damaged file.
    """
    number = 0
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number <= skip or not line.strip():
                    continue
                yield number, _object(path, number, line, fields)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged after line {number} ({error}): write or download it again"
        ) from error


def _object(path: Path, number: int, line: bytes, fields: tuple[str, ...]) -> Record:
    where = f"{path} line {number}"
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8: mend the line, or remove it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): mend the line, or remove it") from error
    require(
        isinstance(record, dict),
        f"{where} is a {type(record).__name__}, expected an object: mend the line, or remove it",
    )
    for name in fields:
        require(
            name in record,
            f"{where} has no field {name!r}, it has {', '.join(sorted(record)) or 'none'}: name "
            "the right one with --data.text-field",
        )
    return record


def _open_lines(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return _ZstdLines(path)
    return path.open("rb")


class _ZstdLines:
    """Lines of a file that zstd has packed."""

    def __init__(self, path: Path) -> None:
        self._zstd = optional_package("zstandard", path)
        self._file = path.open("rb")

    def __enter__(self) -> Iterator[bytes]:
        return self._lines()

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def _pieces(self) -> Iterator[bytes]:
        """What the frames of the file hold, one frame after the other.

        Raises:
          EOFError: it is damaged, or ends inside a frame.
        """
        frame = None
        while packed := self._file.read(PACKED_AT_ONCE):
            while packed:
                frame = frame or self._zstd.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(packed)
                except self._zstd.ZstdError as error:
                    raise EOFError(str(error)) from error
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends before its end was written")

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_parquet(path: Path, fields: tuple[str, ...], skip: int = 0) -> Records:
    """Rows of a parquet file; arguments as read_jsonl's.

    Raises:
      UserError: a missing column, a damaged file, or pyarrow is not installed.
    """
    parquet = optional_package("pyarrow.parquet", path)
    with _arrow_errors(path), parquet.ParquetFile(path, memory_map=True) as file:
        columns = _columns(path, fields, file.schema_arrow.names)
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                yield from _rows(batch, number, skip)
                number += batch.num_rows


def read_arrow(path: Path, fields: tuple[str, ...], skip: int = 0) -> Records:
    """Rows of an arrow file, as Hugging Face's datasets have them; arguments as read_jsonl's.

    Raises:
      UserError: as read_parquet.
    """
    arrow = optional_package("pyarrow", path)
    ipc = importlib.import_module("pyarrow.ipc")
    with _arrow_errors(path), arrow.memory_map(str(path)) as mapped:
        try:
            batches = iter(ipc.open_stream(mapped))
            names = batches.schema.names  # type: ignore[attr-defined]
        except arrow.ArrowInvalid:
            file = ipc.open_file(mapped)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            names = file.schema.names
        columns = _columns(path, fields, names)
        number = 0
        for batch in batches:
            wanted = batch.select(columns)
            for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield from _rows(wanted.slice(begin, ROWS_AT_ONCE), number + begin, skip)
            number += batch.num_rows


def _rows(batch: Any, before: int, skip: int) -> Records:
    if before + batch.num_rows <= skip:
        return
    for number, record in enumerate(batch.to_pylist(), start=before + 1):
        if number > skip:
            yield number, record


def _columns(path: Path, fields: tuple[str, ...], names: list[str]) -> list[str]:
    """The columns to read.

    Raises:
      UserError: a missing one.
    """
    for name in fields:
        require(
            name in names,
            f"{path} has no column {name!r}, it has {', '.join(names)}: name the right one with "
            "--data.text-field",
        )
    return [name for name in names if name in (*fields, TOOLS)]


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Makes a sentence of what pyarrow raises for a damaged file."""
    errors = importlib.import_module("pyarrow").ArrowException
    try:
        yield
    except (errors, OSError) as error:  # of a file that was cut, arrow says OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}): write or download it again") from error


def optional_package(name: str, path: Path) -> Any:
    """The module of an optional package that this file is read with.

    Raises:
      UserError: it is not installed.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{path} is read with {package}, which is not installed: {INSTALL.format(package)}"
        ) from error


ReadRecords = Callable[[Path, tuple[str, ...], int], Records]
READERS: dict[str, ReadRecords] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""By the ending of a file's name."""


def reader_of(path: Path) -> ReadRecords | None:
    """How the file's records are read; None where it is none of records."""
    name = path.name.lower()
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)
