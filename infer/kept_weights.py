"""Weights that were brought into their format once, kept in a folder of the user's.

A file is of one source in one format: NAME.FORMAT.HASH, of which there is one, whatever the source
and the code become. In it stands what it was made of (`made_of`): the source's files as they were,
the model, the target, and the code that read and rounded. Where that differs, or the file is
damaged, the source is read as ever and the file is written anew.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from checkpoint.kept_variables import DamagedFile, read_kept, write_kept
from infer.kept_files import UNFINISHED, code_hash, make_room
from infer.weights import num_bytes
from kernels import native
from kernels.backend import current_target
from model.transformer import Transformer, Variables

CODE = (
    *("checkpoint", "configs", "formats", "kernels", "model", "parallel"),
    *("infer/adapters.py", "infer/kept_weights.py", "infer/load.py"),
    *("infer/sources.py", "infer/weights.py"),
)
"""What says how weights are read from a source, and how they lie in memory."""
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "orbax-checkpoint")

Fingerprint = Callable[[], str | None]
"""Tells what the files of a source are; None where nobody can say, or not what was read of them."""


@dataclass(frozen=True)
class KeptWeights:
    """A folder of weights in their formats; those that were not used for longest give way."""

    folder: Path
    most_bytes: float
    """Of all files; less where the disk is full."""
    tell: Callable[[str], None]
    """Is told in a sentence what could not be read or kept."""
    least_seconds: float = 1.0
    """That reading has to take for its result to be kept."""
    bytes_per_second: float = 5e8
    """Of a kept file, from a disk: reading has to take longer than that, too."""

    def load(
        self,
        name: str,
        made_of: str,
        read: Callable[[], Variables],
        is_unchanged: Callable[[], bool],
    ) -> Variables:
        """The variables, kept or read; what is read is kept if it is worth it.

        Args:
          name: of the file.
          made_of: by `made_of`.
          is_unchanged: whether the source is still what it was; asked when it was read.
        """
        kept = self._read(self.folder / name, made_of)
        if kept is not None:
            return kept
        began = time.perf_counter()
        variables = jax.block_until_ready(read())
        size, seconds = num_bytes(variables), time.perf_counter() - began
        is_slow = seconds > self.least_seconds + size / self.bytes_per_second
        if is_slow and is_unchanged():
            self._keep(self.folder / name, made_of, variables, size)
        return variables

    def _read(self, path: Path, made_of: str) -> Variables | None:
        try:
            variables = read_kept(path, made_of)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, DamagedFile) as error:
            self.tell(f"the kept weights {path} can't be read ({error}): they are made anew")
            return None
        if variables is not None:
            with contextlib.suppress(OSError):  # another's folder
                os.utime(path)
        return variables

    def _keep(self, path: Path, made_of: str, variables: Variables, size: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if make_room(self.folder, size, self.most_bytes, path):
                handle, name = tempfile.mkstemp(UNFINISHED, dir=self.folder)
                with contextlib.ExitStack() as stack:
                    stack.callback(Path(name).unlink, missing_ok=True)
                    with os.fdopen(handle, "wb") as file:
                        write_kept(file, made_of, variables)
                    Path(name).replace(path)
        except OSError as error:
            self.tell(f"weights are not kept in {self.folder} ({error.strerror or error})")


def made_of(fingerprint: str, model: Transformer, *settings: Any) -> str:
    """All that weights in memory depend on, as a hash.

    Args:
      fingerprint: of the source's files.
      settings: format, dtype and the like, as they print.
    """
    target = current_target()
    has_native = target.platform == "cpu" and native.is_available()
    machine = (target, native.isa() if has_native else "", jax.local_devices()[0].device_kind)
    libraries = [version(name) for name in LIBRARIES]
    known = (
        fingerprint,
        model.config,
        model.execution,
        settings,
        machine,
        libraries,
        code_hash(CODE),
    )
    return hashlib.sha256(repr(known).encode()).hexdigest()


def file_name(name: str, *told: Any) -> str:
    """The name of a file.

    Args:
      name: that a reader knows it by.
      told: by what it differs from the others, as it prints.
    """
    plain = re.sub(r"[^\w.-]+", "_", name).strip(".")[:60]
    return f"{plain}.{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def opened_files(files: Callable[[], Iterable[Path]]) -> Fingerprint:
    """Of files of which a part is read early, as long as they are what they are now: to be asked
    for before that.
    """
    opened = fingerprint_of(files())
    return lambda: opened if fingerprint_of(files()) == opened else None


def fingerprint_of(files: Iterable[Path]) -> str | None:
    """Size, times and number of each file; None where one is missing."""
    try:
        stats = [(str(path), path.stat()) for path in sorted(files)]
    except OSError:
        return None  # reading it says why
    return repr([(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats])


def together(*parts: str | None) -> str | None:
    """The fingerprint of all; None where one is missing."""
    return None if None in parts else repr(parts)
