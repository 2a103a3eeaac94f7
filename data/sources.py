"""Sources of a corpus as streams of documents: text, records, chats, or tokens.

A source is cut into units, each read from its beginning to its end: a file of records or tokens, or
all text files of a folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.checks import UserError, require, require_text
from configs.data import DataConfig, Form, MixturePart
from data.corpora import (
    BEGINNING,
    END,
    LeftOut,
    list_files,
    list_source,
    path_below,
    source_path,
    source_sizes,
    split_lines,
)
from data.preferences import SIDES
from data.records import TOOLS, ReadRecords, reader_of
from data.tokenized import is_tokenized, read_tokenized
from formats.small_files import read_json_object

DEFAULT_FIELDS: dict[Form, str] = {"text": "text", "chat": "messages", "preference": "chosen"}
DATASET, DATASET_DICT = "state.json", "dataset_dict.json"
"""What Hugging Face's datasets write beside their arrow files."""


class Item(NamedTuple):
    """A document on its way into a token file: one of text, ids and messages."""

    position: int
    """In its unit, from 1: reading can go on after it."""
    file: int
    """Index in the unit's files."""
    number: int
    """Of the record in the file, from 1; 0 where the file is the document."""
    text: str | None = None
    ids: np.ndarray | None = None
    messages: Any = None
    """Of a chat; of preferences the record."""
    tools: Any = None
    """Functions that the assistant may call."""
    is_held_out: bool | None = None
    """None: a hash of the name decides."""

    @property
    def size(self) -> int:
        """About its characters."""
        if self.text is not None:
            return len(self.text)
        return 4 * len(self.ids) if self.ids is not None else len(str(self.messages))


@dataclass(frozen=True)
class Unit:
    """Documents that are read one after the other."""

    files: tuple[str, ...]
    """Names below the source."""
    stamp: str
    """Changes with what is in it: sizes and dates."""
    num_bytes: int
    where: str
    """For an error's sentence: "path line"."""
    items: Callable[[int], Iterator[Item]]
    """The items after so many positions."""

    def name_of(self, item: Item) -> str:
        """The document's name: "part.jsonl:17", or the file's."""
        file = self.files[item.file]
        return f"{file}:{item.number}" if item.number else file


class OpenedSource(NamedTuple):
    units: list[Unit]
    left_out: list[LeftOut]


def is_streamed(part: MixturePart, form: Form) -> bool:
    """Whether the source is of records or tokens, not a folder or file of text."""
    root = source_path(part.source)
    if form != "text" or (root.is_dir() and (root / DATASET).exists()):
        return True
    if root.is_dir() and (root / DATASET_DICT).exists():
        return True
    path = root if root.is_file() else Path(f"x{part.suffix}")
    return reader_of(path) is not None or is_tokenized(path)


def open_part(part: MixturePart, data: DataConfig, end_of_text: int) -> OpenedSource:
    """The units of one source, in the order of their names; only text is read for it.

    Args:
      data: the form of its records, and the share of a single text file that is held out.
      end_of_text: token between documents, for files of tokens.
    Raises:
      UserError: there is nothing that can be read.
    """
    form = data.form
    if not is_streamed(part, form):
        return _text_units(part, data.holdout_fraction)
    root = source_path(part.source)
    paths, left_out = _paths(part, root)
    field = part.text_field or DEFAULT_FIELDS[form]
    fields = (field,) if form != "preference" else tuple(dict.fromkeys((*SIDES, field)))
    units = [_file_unit(path, path_below(root, path), form, fields, end_of_text) for path in paths]
    require(
        bool(units),
        f"data.source={part.source!r} has no files that end in {part.suffix!r}: give another "
        "folder or --data.suffix",
    )
    return OpenedSource(units, left_out)


def sizes_of(data: DataConfig) -> dict[str, int]:
    """Bytes of each file of all sources, by source and name; no file is read.

    Raises:
      UserError: a source is gone.
    """
    parts = list(data.parts)
    if data.held_out is not None:
        parts.append(replace(parts[0], source=data.held_out))
    sizes: dict[str, int] = {}
    for part in parts:
        if is_streamed(part, data.form):
            root = source_path(part.source)
            own = {path_below(root, path): path.stat().st_size for path in _paths(part, root)[0]}
        else:
            own = dict(source_sizes(part.source, part.suffix))
        sizes |= {f"{part.source}: {name}": size for name, size in own.items()}
    return sizes


def _paths(part: MixturePart, root: Path) -> tuple[list[Path], list[LeftOut]]:
    if root.is_dir() and (root / DATASET_DICT).exists():
        splits = read_json_object(root / DATASET_DICT).get("splits", [])
        raise UserError(
            f"data.source={part.source!r} is a dictionary of datasets ({', '.join(splits)}): name "
            f"one of them, such as {root / str((splits or ['train'])[0])}, and another with "
            "--data.held-out"
        )
    if root.is_dir() and (root / DATASET).exists():
        state = read_json_object(root / DATASET)
        require(
            not state.get("_indices_files"),
            f"data.source={part.source!r} is a selection of another dataset's rows: write it with "
            "dataset.flatten_indices().save_to_disk(...)",
        )
        return [root / file["filename"] for file in state.get("_data_files", [])], []
    found = sorted(list_files(root, part.suffix))
    left_out = [LeftOut(path_below(root, path), reason) for path, reason in found if reason]
    return [path for path, reason in found if not reason], left_out


def _file_unit(
    path: Path, name: str, form: Form, fields: tuple[str, ...], end_of_text: int
) -> Unit:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    read = reader_of(path)
    if read is not None:
        items, where = _record_items(path, read, form, fields), f"{path} line"
    else:
        require(
            is_tokenized(path) and form == "text",
            f"{path} is no file of records, which data.form={form!r} needs: give .jsonl, "
            ".jsonl.gz, .jsonl.zst, .parquet, or a folder of datasets",
        )
        items, where = _token_items(path, end_of_text), f"{path} document"
    stamp = f"{name} {state.st_size} {state.st_mtime_ns}"
    return Unit((name,), stamp, state.st_size, where, items)


def _record_items(
    path: Path, read: ReadRecords, form: Form, fields: tuple[str, ...]
) -> Callable[[int], Iterator[Item]]:
    def items(skip: int) -> Iterator[Item]:
        field = fields[0]
        for number, record in read(path, fields, skip):
            value = record[field]
            if form != "text":
                messages = value if form == "chat" else {name: record[name] for name in fields}
                yield Item(number, 0, number, messages=messages, tools=record.get(TOOLS))
                continue
            require(
                value is None or isinstance(value, str),
                f"{path} line {number} has {value!r:.40} in {field!r}, expected text: name "
                "another field with --data.text-field",
            )
            text = value or ""
            require_text(text, f"{field!r} in {path} line {number}")
            yield Item(number, 0, number, text=text)

    return items


def _token_items(path: Path, end_of_text: int) -> Callable[[int], Iterator[Item]]:
    def items(skip: int) -> Iterator[Item]:
        for number, ids in read_tokenized(path, end_of_text, skip):
            yield Item(number, 0, number, ids=ids)

    return items


def _text_units(part: MixturePart, fraction: float) -> OpenedSource:
    """All text of a source as one unit; of a single file the last lines are held out."""
    files, left_out = list_source(part.source, part.suffix)
    states = [file.path.stat() for file in files]
    stamps = [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(files, states, strict=True)]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    total = sum(state.st_size for state in states)
    if source_path(part.source).is_file():
        name = files[0].name

        def halves(skip: int) -> Iterator[Item]:
            ((begin,), (end,)) = split_lines([files[0].read()], fraction)
            both = (Item(1, 0, 0, begin.text, is_held_out=False), Item(2, 1, 0, end.text))
            yield from (both[0], both[1]._replace(is_held_out=True))[skip:]

        names = (name + BEGINNING, name + END)
        return OpenedSource([Unit(names, digest, total, name, halves)], left_out)

    def items(skip: int) -> Iterator[Item]:
        for i in range(skip, len(files)):
            yield Item(i + 1, i, 0, files[i].read().text)

    names = tuple(file.name for file in files)
    return OpenedSource([Unit(names, digest, total, part.source, items)], left_out)
