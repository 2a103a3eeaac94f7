"""The tensors of a checkpoint folder in safetensors form, found and checked before any is read.

Our own reader, because the public library's NumPy side can't read float8, and because what comes
from strangers is refused here in sentences. Tensors are read into arrays, not mapped: resident
memory is what was asked for, and a file that shrinks meanwhile can't end the process.

A folder holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names, or
several .safetensors files without index. An index may name files of its own folder only. One of
these may be a symbolic link to anywhere (the cache of Hugging Face keeps its files so): whoever
could put a link there could have put the file there.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configs.checks import require
from formats.safetensors.header import (
    MAX_JSON_BYTES,
    TensorInfo,
    explain_os_errors,
    parse_object,
    quote,
    read_header,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Formats that run the sender's code when they are opened: they never are."""

_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_Stamp = tuple[int, int, int]


class TensorFiles:
    """The tensors of one checkpoint; made by `open_tensors`. Holds no file open."""

    def __init__(
        self, folder: Path, tensors: dict[str, TensorInfo], stamps: dict[Path, _Stamp]
    ) -> None:
        self.folder, self.tensors, self._stamps = folder, tensors, stamps

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, in the dtype and shape of the file.

        Raises:
          UserError: the file changed since it was opened, or can't be read.
        """
        info = self.tensors[name]
        return self._read(info, info.begin, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) along the first dim; otherwise as `read`."""
        info = self.tensors[name]
        rows = info.shape[0]
        assert 0 <= start <= stop <= rows, (name, start, stop, rows)
        row_bytes = info.nbytes // max(rows, 1)
        return self._read(info, info.begin + start * row_bytes, (stop - start, *info.shape[1:]))

    def _read(self, info: TensorInfo, begin: int, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, info.dtype)
        with _open(info.file) as file:
            file.seek(begin)
            whole = _fill(file, _bytes_of(array))
            require(
                whole and _stamp(file) == self._stamps[info.file],
                f"{info.file} changed while it was read, at tensor {quote(info.name)}: leave the "
                "folder alone until this has ended, and start again",
            )
        if info.dtype == np.bool_:
            require(
                not np.any(array.view(np.uint8) > 1),
                f"{info.file}: tensor {quote(info.name)} is BOOL and has bytes other than 0 and 1",
            )
        return array


def open_tensors(folder: Path) -> TensorFiles:
    """Finds a checkpoint's files and checks all their headers; reads no tensor.

    Raises:
      UserError: no checkpoint is there, or one that is damaged, incomplete, ambiguous or unsafe.
    """
    with explain_os_errors(folder, "be listed"):
        require(not folder.is_file(), f"{folder} is a file: give the folder that it lies in")
        require(folder.is_dir(), f"{folder} doesn't exist: give the folder of a checkpoint")
        present = {path.name for path in folder.iterdir()}
    weight_map = None
    if INDEX in present:
        weight_map = _read_index(folder / INDEX, present)
        names = sorted(set(weight_map.values()))
    else:
        names = _files_without_index(folder, present)
    tensors: dict[str, TensorInfo] = {}
    stamps: dict[Path, _Stamp] = {}
    for path in (folder / name for name in names):
        with _open(path) as file:
            stamps[path] = _stamp(file)
            _merge(tensors, read_header(path, file, stamps[path][0]))
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    return TensorFiles(folder, tensors, stamps)


def _files_without_index(folder: Path, present: set[str]) -> list[str]:
    if SINGLE in present:
        return [SINGLE]
    names = sorted(name for name in present if name.endswith(".safetensors"))
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    require(
        bool(names) or not pickles,
        f"{folder} holds {', '.join(map(quote, pickles[:3]))}, which may run code when opened "
        "and is never opened here: convert it to safetensors where you trust it, or get the "
        "safetensors files of the same model",
    )
    require(
        bool(names),
        f"{folder} holds no checkpoint: {SINGLE}, or {INDEX} and its shards, must lie in it",
    )
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        stem, _, count = match.groups()
        wanted = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        missing = [name for name in wanted if name not in present]
        require(
            not missing,
            f"{folder} lacks {quote(missing[0]) if missing else ''} (its files are numbered to "
            f"{int(count)}, {len(missing)} are missing): get the missing files",
        )
    return names


def _read_index(path: Path, present: set[str]) -> dict[str, str]:
    """The file of each tensor, all of them in the index's own folder."""
    with _open(path) as file:
        size, *_ = _stamp(file)
        require(size <= MAX_JSON_BYTES, f"{path} has {size} bytes, too many for an index")
        text = file.read(size)
    weight_map = parse_object(text, str(path)).get("weight_map")
    require(
        isinstance(weight_map, dict)
        and bool(weight_map)
        and all(isinstance(file, str) for file in weight_map.values()),
        f"{path} needs a weight_map from names of tensors to names of files, and has "
        f"{quote(weight_map)}",
    )
    assert isinstance(weight_map, dict)  # for the type checker
    for file in sorted(set(weight_map.values())):
        require(
            not any(c in file for c in "/\\\0") and file not in ("", ".", ".."),
            f"{path} names the file {quote(file)}: an index may only name files of its own "
            "folder, so this one is refused",
        )
        require(
            file.endswith(".safetensors"),
            f"{path} names the file {quote(file)}, which is no .safetensors file: get the index "
            "that belongs to the safetensors files",
        )
        require(file in present, f"{path} names the file {quote(file)}, which is missing: get it")
    require(
        SINGLE not in present or SINGLE in weight_map.values(),
        f"{path.parent} holds both {SINGLE} and an index that doesn't name it: it is unclear "
        "which is the checkpoint, move one of them away",
    )
    return weight_map


def _merge(tensors: dict[str, TensorInfo], more: dict[str, TensorInfo]) -> None:
    for name, info in more.items():
        require(
            name not in tensors,
            f"tensor {quote(name)} is in two files, "
            f"{tensors[name].file if name in tensors else ''} and {info.file}: remove the file "
            "that does not belong here",
        )
        tensors[name] = info


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        found = tensors[name].file.name if name in tensors else None
        place = "is in no file" if found is None else f"is in {quote(found)}"
        require(
            found == file,
            f"{folder / INDEX} says that tensor {quote(name)} is in {quote(file)}, but it {place}: "
            "the index and the files belong to different checkpoints, get them again",
        )
    for name, info in tensors.items():
        require(
            name in weight_map,
            f"{info.file} has tensor {quote(name)}, which {INDEX} doesn't name: the index and the "
            "files belong to different checkpoints, get them again",
        )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Opens a plain file; a pipe or device would let us wait for ever."""
    with explain_os_errors(path, "be read"):
        require(stat.S_ISREG(path.stat().st_mode), f"{path} is no plain file: remove it")
        with path.open("rb") as file:
            yield file


def _stamp(file: BinaryIO) -> _Stamp:
    """What changes when somebody writes to a file or puts another in its place; size first."""
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns, state.st_ino


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fill(file: Any, target: memoryview) -> bool:
    """Reads until the target is full; False if the file ends before."""
    while target:
        count = file.readinto(target)
        if not count:
            return False
        target = target[count:]
    return True
