"""Locks on files: of several processes at work in one place, one goes on, and the others wait or
are told.

The kernel gives a lock back when its process ends, in whatever way.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from configs.checks import UserError, require

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks, such as some networks'."""


@contextlib.contextmanager
def wait_for_lock(path: Path, notice: str) -> Iterator[None]:
    """Holds the lock while the block runs; the file is away afterwards.

    Args:
      notice: printed if another process has it, before waiting.
    """
    while True:
        lock = _open(path)
        if not _try(lock):
            print(notice, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:  # 0: who had it has removed the file
            break
        lock.close()
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def refuse_second(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock while the block runs; the file stays.

    Raises:
      UserError: another process has it; the sentence is `refusal`, where {process} is its number.
    """
    with _open(path) as lock:
        free = _try(lock)
        lock.seek(0)
        require(free, refusal.replace("{process}", lock.read().strip() or "unknown"))
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _open(path: Path) -> TextIO:
    try:
        return path.open("a+", encoding="ascii", errors="replace")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def _try(lock: TextIO) -> bool:
    """Whether the lock was free, and is now this process's."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{lock.name} can't be locked: {error.strerror}") from error
        print(
            f"note: {lock.name} can't be locked here ({error.strerror}): let no other process "
            "work in that place",
            flush=True,
        )
    return True
