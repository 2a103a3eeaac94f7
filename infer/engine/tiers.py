"""Kept prefixes beyond the device: in the host's memory, and in files that outlive the process.

Both hold bytes by key (infer/engine/keys.py) within a bound, and give up what was longest unused. A
file is written under another name and then renamed, and holds its key and a checksum: a process
that is killed, another program's file or a broken disk cost a prefix that is read anew, never a
wrong one.
"""

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from pathlib import Path

from configs.checks import UserError

LOG = logging.getLogger(__name__)
MAGIC = b"moesaic prefix 1\n"
SUFFIX, UNFINISHED = ".prefix", ".unfinished"
WAITING_FILES = 64
"""Units that wait to be written at most; more are not kept on disk."""
FORGOTTEN_SECONDS = 3600.0
"""After which an unfinished file is nobody's."""


class HostTier:
    """Units in memory, `most_bytes` of them at most."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self.num_bytes = most_bytes, 0
        self._units: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, key: bytes) -> bytes | None:
        """A unit, which is then the last to go."""
        unit = self._units.get(key)
        if unit is not None:
            self._units.move_to_end(key)
        return unit

    def put(self, key: bytes, unit: bytes) -> None:
        """Keeps a unit, if it fits at all."""
        if key in self._units or len(unit) > self._most_bytes:
            return
        self._units[key], self.num_bytes = unit, self.num_bytes + len(unit)
        while self.num_bytes > self._most_bytes:
            _, oldest = self._units.popitem(last=False)
            self.num_bytes -= len(oldest)


class DiskTier:
    """Units in files of one folder, which several processes may share.

    Raises:
      UserError: a folder that can't be made or written to.
    """

    def __init__(self, folder: str, most_bytes: int) -> None:
        self._folder, self._most_bytes = Path(folder).expanduser(), most_bytes
        self._has_warned = self._is_full = False
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scan()
            (self._folder / f"probe-{os.getpid()}{UNFINISHED}").write_bytes(b"")
            (self._folder / f"probe-{os.getpid()}{UNFINISHED}").unlink()
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} can't be used ({error}): give one that can be written"
            ) from error
        self._queue: queue.Queue[tuple[bytes, bytes]] = queue.Queue(WAITING_FILES)
        threading.Thread(target=self._write_all, name="prefix files", daemon=True).start()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def get(self, key: bytes) -> bytes | None:
        """A unit that was written whole; None if there is none, or it is not what its name says."""
        path = self._folder / (key.hex() + SUFFIX)
        try:
            found = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"{path} can't be read ({error})")
            return None
        head = len(MAGIC) + len(key)
        unit, checksum = found[head:-32], found[-32:]
        if found[:head] != MAGIC + key or hashlib.sha256(found[:-32]).digest() != checksum:
            self._warn(f"{path} is broken or of another program")
            return None
        with self._lock:
            self._sizes[path.name] = len(found)
            self._sizes.move_to_end(path.name)
        return unit

    def put(self, key: bytes, unit: bytes) -> None:
        """Has a unit written in a while; not, where too many wait or it is there."""
        with self._lock:
            if self._is_full or key.hex() + SUFFIX in self._sizes:
                return
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((key, unit))

    def flush(self) -> None:
        """Waits until all that was put is written."""
        self._queue.join()

    def _write_all(self) -> None:
        while True:
            key, unit = self._queue.get()
            try:
                self._write(key, unit)
            except OSError as error:
                self._is_full = True
                self._warn(f"{self._folder} takes no more files ({error})")
            finally:
                self._queue.task_done()

    def _write(self, key: bytes, unit: bytes) -> None:
        held = MAGIC + key + unit
        size = len(held) + 32
        if size > self._most_bytes:
            return
        self._make_room(size)
        path = self._folder / (key.hex() + SUFFIX)
        unfinished = self._folder / f"{key.hex()}-{os.getpid()}{UNFINISHED}"
        try:
            with unfinished.open("wb") as file:
                file.write(held)
                file.write(hashlib.sha256(held).digest())
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[path.name] = size

    def _make_room(self, size: int) -> None:
        with self._lock:
            while self._sizes and sum(self._sizes.values()) + size > self._most_bytes:
                name, _ = self._sizes.popitem(last=False)
                (self._folder / name).unlink(missing_ok=True)

    def _scan(self) -> None:
        """What is there, the longest unused first; unfinished files of the dead are removed."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process's, removed meanwhile
                stat = path.stat()
                if path.suffix == SUFFIX:
                    found.append((stat.st_mtime, path.name, stat.st_size))
                elif path.suffix == UNFINISHED and time.time() - stat.st_mtime > FORGOTTEN_SECONDS:
                    path.unlink()
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self._make_room(0)

    def _warn(self, sentence: str) -> None:
        """Once: a folder that is broken would fill the log."""
        if not self._has_warned:
            LOG.warning("%s: prefixes are read anew instead", sentence)
        self._has_warned = True


class Tiers:
    """Host before disk; either may be missing."""

    def __init__(self, host: HostTier | None, disk: DiskTier | None) -> None:
        self._host, self._disk = host, disk

    def get(self, key: bytes) -> bytes | None:
        """A unit from the nearest tier that has it."""
        unit = self._host.get(key) if self._host else None
        return self._disk.get(key) if unit is None and self._disk else unit

    def has_disk(self) -> bool:
        return self._disk is not None

    def keep_on_disk(self, key: bytes, unit: bytes) -> None:
        """A new unit, which outlives the process."""
        if self._disk:
            self._disk.put(key, unit)

    def keep_in_host(self, key: bytes, unit: bytes) -> None:
        """A unit whose place on the device is another's now."""
        if self._host:
            self._host.put(key, unit)

    def has_host(self) -> bool:
        return self._host is not None

    def flush(self) -> None:
        """Waits for the files."""
        if self._disk:
            self._disk.flush()
