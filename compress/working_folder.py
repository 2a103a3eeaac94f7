"""Arrays that a long pass has made so far, kept beside its target for the same command to go on."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from formats.atomic_folder import FINGERPRINT, kept_folder, refuse_taken


@contextlib.contextmanager
def working_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """Gives a folder, `<target>.work.partial`, that goes when all went well, and is given again,
    with what is in it, to who comes with the same fingerprint.

    Raises:
      UserError: the target is taken, or another process is at work on it.
    """
    refuse_taken(target)
    with kept_folder(target.with_name(target.name + ".work"), fingerprint) as folder:
        yield folder
        for path in folder.iterdir():
            if path.name != FINGERPRINT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_arrays(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = folder / f"{name}.unfinished.npz"
    np.savez(unfinished, allow_pickle=False, **arrays)
    os.replace(unfinished, folder / f"{name}.npz")


def load_arrays(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    """None: not saved yet."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
