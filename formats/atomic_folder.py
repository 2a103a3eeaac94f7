"""A folder, or a file, that appears under its name only when all of it is on the disk."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from configs.checks import require
from formats.safetensors.header import explain_os_errors

SUFFIX = ".partial"
FINGERPRINT = ".made_from"
"""In a partial folder: what is being made. Held locked by the process that makes it."""


@contextlib.contextmanager
def partial_folder(destination: Path, fingerprint: str) -> Iterator[Path]:
    """Gives the folder to work in, and renames it to `destination` if all went well.

    The folder is `<destination>.partial`. It stays when the work fails or is killed, and is given
    again, with what is in it, to who comes with the same fingerprint; another one empties it.

    Args:
      destination: must not exist, or be an empty folder.
      fingerprint: says what is made and from what: source, its size or date, settings.
    Raises:
      UserError: the destination is taken, somebody else is at work on it, or the disk refuses.
    """
    destination = Path(os.path.normpath(destination.absolute()))
    with kept_folder(destination, fingerprint) as partial:
        yield partial
        refuse_taken(destination)
        with explain_os_errors(destination, "be made"):
            _sync(partial)
            partial.rename(destination)
            sync_folder(destination.parent)
            (destination / FINGERPRINT).unlink()


@contextlib.contextmanager
def partial_file(destination: Path, fingerprint: str) -> Iterator[Path]:
    """As `partial_folder`, for one file: gives its path in such a folder, where notes may lie
    beside it, and moves it to `destination`, which must not exist.
    """
    destination = Path(os.path.normpath(destination.absolute()))
    require(not destination.is_dir(), f"{destination} is a folder: choose another name")
    with kept_folder(destination, fingerprint) as partial:
        yield partial / destination.name
        refuse_taken(destination)
        with explain_os_errors(destination, "be made"):
            _sync(partial)
            (partial / destination.name).rename(destination)
            sync_folder(destination.parent)
            shutil.rmtree(partial)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file, so that a process killed meanwhile leaves the old one or the new.

    Raises:
      OSError: the disk refuses.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def kept_folder(destination: Path, fingerprint: str) -> Iterator[Path]:
    """Gives the folder to work in, `<destination>.partial`, this process's alone. It goes when it
    is empty at the end, and stays, with what is in it, for who comes with the same fingerprint.

    Raises:
      UserError: as `partial_folder`.
    """
    assert fingerprint, "an empty one can't tell a new folder from a kept one"
    refuse_taken(destination)
    partial = destination.with_name(destination.name + SUFFIX)
    with explain_os_errors(partial, "be made"):
        _refuse_foreign(partial)
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / FINGERPRINT).open("a+", encoding="utf-8", errors="replace")
    with lock:
        with explain_os_errors(partial, "be made"):
            _lock(lock, partial)
            _start_or_go_on(lock, partial, fingerprint)
        try:
            yield partial
        finally:
            if partial.exists() and {path.name for path in partial.iterdir()} == {FINGERPRINT}:
                shutil.rmtree(partial)  # nothing was made, or it is away


def refuse_taken(destination: Path) -> None:
    """
    Raises:
      UserError: something is there that is no empty folder.
    """
    with explain_os_errors(destination, "be made"):
        taken = destination.is_symlink() or destination.exists()
        taken = taken and not (_is_plain_folder(destination) and not any(destination.iterdir()))
    require(not taken, f"{destination} exists already: choose another name, or move it away")


def _refuse_foreign(partial: Path) -> None:
    """What lies there and isn't ours is never removed."""
    ours = not os.path.lexists(partial) or (
        _is_plain_folder(partial)
        and ((partial / FINGERPRINT).is_file() or not any(partial.iterdir()))
    )
    require(ours, f"{partial} is where the work would go, and holds something else: move it away")


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _lock(lock: TextIO, partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(lock.fileno()).st_nlink > 0  # 0: the other has just ended
    except BlockingIOError:
        free = False
    require(free, f"another process is at work in {partial}: wait for it, or end it")


def _start_or_go_on(lock: TextIO, partial: Path, fingerprint: str) -> None:
    lock.seek(0)
    if lock.read() == fingerprint:
        return
    lock.truncate(0)
    for path in partial.iterdir():
        if _is_plain_folder(path):
            shutil.rmtree(path)
        elif path.name != FINGERPRINT:
            path.unlink()
    lock.write(fingerprint)
    lock.flush()
    os.fsync(lock.fileno())


def _sync(folder: Path) -> None:
    """Returns when all files of the folder, and their names, are on the disk."""
    for parent, _, names in os.walk(folder):
        for path in [Path(parent) / name for name in names]:
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Returns when the names of the folder's files are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
