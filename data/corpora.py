"""Text files to learn from, split into training and held-out modules.

The built-in corpus is the source of the Python standard library that runs this program: real code
on every machine, without a download.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from configs.checks import UserError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
"""Folders that are not read: test data and installed packages."""


class Document(NamedTuple):
    name: str
    """Dotted module name, e.g. 'json.decoder', or the path for other files."""
    text: str


def read_documents(source: str, suffix: str) -> list[Document]:
    """All readable documents below a folder, sorted by name.

    Args:
      source: 'stdlib', or a folder.
      suffix: ending of the files to read, e.g. '.py'.
    Raises:
      UserError: no such folder, or no file in it that holds text.
    """
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if not root.is_dir():
        raise UserError(
            f"data.source={source!r} is no folder: give a folder of text files or 'stdlib'"
        )
    documents = [
        Document(_name(path, root), text)
        for path in _files(root, suffix)
        if (text := _read_text(path)) is not None
    ]
    if not documents:
        raise UserError(
            f"data.source={source!r} holds no UTF-8 text in files ending in {suffix!r}: "
            "give another folder or --data.suffix"
        )
    return sorted(documents)


def split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
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


def name_hash(name: str) -> float:
    """A number in [0, 1) from the SHA-256 of the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _files(root: Path, suffix: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(suffix))


def _name(path: Path, root: Path) -> str:
    relative = path.relative_to(root)
    if relative.suffix != ".py":
        return relative.as_posix()
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _read_text(path: Path) -> str | None:
    """The file's text; None for an empty file and for one that is not UTF-8."""
    try:
        return path.read_bytes().decode() or None
    except UnicodeDecodeError:
        return None
