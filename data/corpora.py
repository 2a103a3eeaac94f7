"""Text files to learn from, split into training and held-out modules.

The built-in corpus is the source of the Python standard library that runs this program: real code
on every machine, without a download. Of any other folder every file with the suffix is read, and
what can't be is left out with its reason; nothing is left out in silence. No more than one file is
in memory at a time.
"""

import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from configs.checks import UserError, require

TESTS = {"test", "tests", "idle_test"}
"""Folders of the standard library that are not read: they are as large as the rest, and data."""
INSTALLED = {"site-packages", "__pycache__"}
"""Folders that are never read: what others wrote, and what Python made."""
BEGINNING, END = ", beginning", ", end"
"""What follows the name of a single file in the names of its two parts."""


class Document(NamedTuple):
    name: str
    """Dotted module name, e.g. 'json.decoder', or the path for other files."""
    text: str


class LeftOut(NamedTuple):
    path: str
    """Below the source."""
    reason: str


class TextFile(NamedTuple):
    """A file that was read once, and is again when its text is needed."""

    name: str
    """As Document's."""
    path: Path
    num_bytes: int

    def read(self) -> Document:
        """
        Raises:
          UserError: it has changed since.
        """
        text, reason = _read_text(self.path)
        now = -1 if text is None else len(text.encode())
        require(
            now == self.num_bytes,
            f"{self.path} has changed while the corpus was made"
            f"{f' (it is {reason})' if reason else ''}: start again when nothing writes there",
        )
        assert text is not None
        return Document(self.name, text)


class Reading(NamedTuple):
    documents: list[Document]
    """Sorted by name."""
    left_out: list[LeftOut]


class Listing(NamedTuple):
    files: list[TextFile]
    """Sorted by name, and those of one name by their text."""
    left_out: list[LeftOut]


def read_documents(source: str, suffix: str) -> list[Document]:
    """All readable documents of a source; see `read_source`."""
    return read_source(source, suffix).documents


def read_source(source: str, suffix: str) -> Reading:
    """Every document of a source at once, and what was left out; see `list_source`."""
    files, left_out = list_source(source, suffix)
    return Reading([file.read() for file in files], left_out)


def list_source(source: str, suffix: str) -> Listing:
    """Every file of a source that holds text, each read to see whether it does, and what was left
    out.

    Args:
      source: 'stdlib', a folder, or a single file, whatever its ending.
      suffix: ending of a folder's files to read, e.g. '.py'.
    Raises:
      UserError: no such folder, none of its files holds text, or they hold records.
    """
    root = source_path(source)
    files: list[TextFile] = []
    left_out, records = [], []
    for path, reason in list_files(root, suffix, source == "stdlib"):
        text, reason = (None, reason) if reason else _read_text(path)
        if text is None:
            left_out.append(LeftOut(path_below(root, path), reason))
            continue
        file = TextFile(document_name(path_below(root, path)), path, len(text.encode()))
        files.append(file)
        if _holds_records(text):
            records.append(file.name)
    if not files:
        raise UserError(_no_text(source, suffix, root, left_out))
    _refuse_records(source, records)
    shared = {name for name, count in Counter(f.name for f in files).items() if count > 1}
    files.sort(key=lambda f: (f.name, f.read().text if f.name in shared else ""))
    return Listing(files, sorted(left_out))


def source_path(source: str) -> Path:
    """Where a source lies.

    Raises:
      UserError: nothing that can be read is there.
    """
    if source == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    path = Path(os.path.expanduser(source))
    require(
        path.is_dir() or path.is_file(),
        f"data.source={source!r} is no folder and no file: give a folder of text files, one text "
        "file, or 'stdlib'",
    )
    return path


def source_sizes(source: str, suffix: str) -> Counter[str]:
    """Bytes of each file that `read_source` would look into, by document name.

    Raises:
      UserError: as source_path.
    """
    root = source_path(source)
    sizes: Counter[str] = Counter()
    for path, reason in list_files(root, suffix, source == "stdlib"):
        if not reason:
            sizes[document_name(path_below(root, path))] += path.stat().st_size
    return sizes


def document_name(path: str) -> str:
    """A document's name from its file's path below the source: a module's is dotted."""
    relative = Path(path)
    if relative.suffix != ".py":
        return relative.as_posix()
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


D = TypeVar("D", Document, TextFile)


def split(documents: list[D], fraction: float) -> tuple[list[D], list[D]]:
    """(training, held out): a module is held out where the hash of its name falls below `fraction`.

    The choice depends on the name alone, so it stays the same when other files come or go.

    Raises:
      UserError: one of the two would be empty.
    """
    held_out = [document for document in documents if name_hash(document.name) < fraction]
    training = [document for document in documents if name_hash(document.name) >= fraction]
    if not held_out or not training:
        raise UserError(
            f"holding out {fraction:.0%} of {len(documents)} files leaves {len(training)} for "
            "training and "
            f"{len(held_out)} held out: add files or change --data.holdout-fraction"
        )
    return training, held_out


def split_lines(
    documents: list[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """(training, held out) of a source that is a single file: its last lines are held out.

    Raises:
      UserError: one of the two would be empty.
    """
    (document,) = documents
    lines = document.text.splitlines(keepends=True)
    count = len(lines) - round(len(lines) * fraction)
    name, parts = document.name, ("".join(lines[:count]), "".join(lines[count:]))
    require(
        all(parts),
        f"holding out {fraction:.0%} of the {len(lines)} lines of {name} leaves {count} for "
        f"training and {len(lines) - count} held out: add text or change --data.holdout-fraction",
    )
    return [Document(name + BEGINNING, parts[0])], [Document(name + END, parts[1])]


def name_hash(name: str) -> float:
    """A number in [0, 1) from the SHA-256 of the name, of its bytes where it is no UTF-8."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def list_files(root: Path, suffix: str, is_stdlib: bool = False) -> Iterator[tuple[Path, str]]:
    """Each file with the suffix and why it can't be read, "" where it may; opens none of them."""
    if root.is_file():
        yield root, ""
        return
    skipped = INSTALLED | TESTS if is_stdlib else INSTALLED
    unread: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unread.append):
        inner = Path(folder)
        for name in names:
            if name.endswith(suffix):
                yield inner / name, _why_no_file(inner / name)
        links = [name for name in subfolders if (inner / name).is_symlink()]
        apart = [name for name in subfolders if name in skipped and name not in links]
        subfolders[:] = [name for name in subfolders if name not in (*links, *apart)]
        if not is_stdlib:  # of which the same is left out everywhere
            yield from ((inner / name, "a linked folder") for name in links)
            found = (name for name in apart if any(_walk(inner / name, suffix)))
            yield from ((inner / name, "a folder of installed packages") for name in found)
    yield from ((Path(error.filename), f"can't be read: {error.strerror}") for error in unread)


def _walk(root: Path, suffix: str) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if name.endswith(suffix))


def _why_no_file(path: Path) -> str:
    """A pipe would let us wait for ever."""
    try:
        return "" if stat.S_ISREG(path.stat().st_mode) else "no plain file"
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        return f"can't be read: {error.strerror}"


def path_below(root: Path, path: Path) -> str:
    return os.path.relpath(path, root if root.is_dir() else root.parent)


def _read_text(path: Path) -> tuple[str | None, str]:
    """The file's text, or None and why not."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None, "no UTF-8"
    except OSError as error:
        return None, f"can't be read: {error.strerror}"
    return (text, "") if text else (None, "empty")


def _no_text(source: str, suffix: str, root: Path, left_out: list[LeftOut]) -> str:
    """The sentence for a source without a document: what is there instead."""
    reasons = f" ({shown_reasons(left_out)})" if left_out else ""
    if root.is_file():
        return f"data.source={source!r} holds no UTF-8 text{reasons}: give a text file or a folder"
    endings = Counter(path.suffix for path in _walk(root, "") if path.suffix != suffix)
    where = f"{suffix!r}{reasons}"
    others = [f"{count} of {ending or 'no ending'}" for ending, count in endings.most_common(3)]
    there = f"; it has {', '.join(others)}" if others else ""
    return (
        f"data.source={source!r} holds no UTF-8 text in files ending in {where}{there}: "
        "give another folder or --data.suffix"
    )


def shown_reasons(left_out: list[LeftOut]) -> str:
    """Each reason with its count and its first file: "2 no UTF-8: a.py, ..."."""
    groups: dict[str, list[str]] = {}
    for path, reason in left_out:
        groups.setdefault(reason, []).append(path)
    return "; ".join(
        f"{len(paths)} {reason}: {paths[0]}{', ...' if len(paths) > 1 else ''}"
        for reason, paths in groups.items()
    )


def _refuse_records(source: str, records: list[str]) -> None:
    """
    Raises:
      UserError: files of JSON objects, line by line: a model would learn their braces.
    """
    require(
        not records,
        f"data.source={source!r} has {len(records)} files of records, a JSON object in each line "
        f"({records[0] if records else ''}): rename them to .jsonl, of which the text is read",
    )


def _holds_records(text: str) -> bool:
    """Whether the first two lines are an object of JSON each."""
    lines = text.lstrip("\ufeff").lstrip().split("\n", 2)[:2]
    return len(lines) == 2 and all(_is_object(line) for line in lines)


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
