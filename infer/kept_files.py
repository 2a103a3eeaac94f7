"""What is kept in the user's cache folder: the code that made it, and the room that it takes."""

import contextlib
import functools
import hashlib
import shutil
import time
from pathlib import Path

SOURCE_SUFFIXES = (".py", ".json", ".cc", ".h", ".inl")
UNFINISHED, FORGOTTEN_SECONDS = ".unfinished", 3600.0
"""The end of the name of a file that is being written, and what age says that nobody does."""
SHARE_OF_FREE = 0.1
"""Of the disk's room that kept files take, at most."""


@functools.cache
def code_hash(names: tuple[str, ...]) -> str:
    """A hash of these packages and files of the project."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for name in names:
        for path in sorted([root / name, *(root / name).rglob("*")]):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def make_room(folder: Path, size: int, most_bytes: float, replaced: Path | None = None) -> bool:
    """Whether so many bytes may come; files that were not used for longest give way to them.

    Args:
      most_bytes: of all files; less where the disk is full.
      replaced: the file that they are for, which goes first.
    Raises:
      OSError: the folder can't be looked at.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            files.append((path.stat(), path))
    used = sum(stat.st_size for stat, _ in files)
    room = SHARE_OF_FREE * (shutil.disk_usage(folder).free + used)
    most = min(most_bytes, room)
    if size > most:
        return False
    now = time.time()
    for stat, path in sorted(files, key=lambda file: (file[1] != replaced, file[0].st_mtime)):
        age = now - stat.st_mtime
        is_over, is_unfinished = used + size > most, path.name.endswith(UNFINISHED)
        if age > FORGOTTEN_SECONDS if is_unfinished else is_over:
            path.unlink(missing_ok=True)
            used -= stat.st_size
    return used + size <= most
