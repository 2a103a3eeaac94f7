"""Writing a checkpoint in safetensors form, tensor by tensor, so that a killed writer can go on.

Which tensor lies where is planned from names, dtypes and shapes alone. A shard is written under a
name that ends in .partial and gets its own when it is whole and on the disk; a writer with the same
plan finds it and goes on with the next. The index comes last.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from configs.checks import require
from formats.atomic_folder import sync_folder
from formats.safetensors.header import encode_header, explain_os_errors
from formats.safetensors.reader import INDEX, SINGLE

PARTIAL = ".partial"
Planned = tuple[str, np.dtype[Any], tuple[int, ...]]


class _Shard:
    """The plan of one file."""

    def __init__(self, path: Path, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.tensors = {name: (dtype, shape) for name, dtype, shape in tensors}
        self.header, self.begins = encode_header(self.tensors, metadata)
        self.file_bytes = len(self.header) + sum(_nbytes(planned) for planned in tensors)

    def is_whole(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != self.file_bytes:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header


class TensorWriter:
    """Writes the planned tensors into a folder; leaving it without error writes the index.

    with TensorWriter(folder, plan) as writer:
        for name, _, _ in plan:
            if not writer.done(name):
                writer.write(name, make(name))
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, Any, Sequence[int]]],
        *,
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        single: str = SINGLE,
    ) -> None:
        """Plans the shards: in the order given, each filled while the next tensor fits.

        Args:
          tensors: name, dtype and shape of each, in the order they will be written in.
          max_shard_bytes: of tensors in a file; a larger tensor gets a file of its own.
          single: name of the file where there is one.
          metadata: of each header; {"format": "pt"} if None, without which transformers refuses.
        Raises:
          UserError: the folder can't be written, or has safetensors files of another plan.
        """
        plan = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
        assert plan, "there is nothing to write"
        assert len({name for name, _, _ in plan}) == len(plan), "names must occur once"
        groups = _groups(plan, max_shard_bytes)
        total = len(groups)
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        self._folder, self._file = folder, None
        metadata = {"format": "pt"} if metadata is None else metadata
        self._shards = [
            _Shard(folder / name, group, metadata)
            for name, group in zip(names if total > 1 else [single], groups, strict=True)
        ]
        self._shard_of = {name: shard for shard in self._shards for name in shard.tensors}
        with explain_os_errors(folder, "be written"):
            folder.mkdir(parents=True, exist_ok=True)
            self._whole = {shard.path for shard in self._shards if shard.is_whole()}
            self._clear()
        self._open_shard: _Shard | None = None
        self._missing: set[str] = set()

    def done(self, name: str) -> bool:
        """Whether the tensor lies in a whole shard and need not be made again."""
        return self._shard_of[name].path in self._whole

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; nothing is done for one that is `done`.

        Shards come in order; the tensors of a shard may come in any.

        Raises:
          UserError: the disk is full or can't be written.
        """
        shard = self._shard_of[name]
        planned = shard.tensors[name]
        assert (array.dtype, array.shape) == planned, (name, array.dtype, array.shape, planned)
        if self.done(name):
            return
        with explain_os_errors(shard.path, "be written"):
            file = self._begin(shard)
            assert name in self._missing, f"{name} was written already"
            file.seek(shard.begins[name])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._missing.remove(name)
            if not self._missing:
                self._end(shard, file)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, said already
                self._file.close()
        if kind is None:
            self._finish()

    def _begin(self, shard: _Shard) -> BinaryIO:
        if self._open_shard is not shard or self._file is None:
            assert not self._missing, f"{sorted(self._missing)} must be written first"
            self._file = _partial(shard.path).open("wb")
            self._file.write(shard.header)
            self._open_shard, self._missing = shard, set(shard.tensors)
        return self._file

    def _end(self, shard: _Shard, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        _partial(shard.path).rename(shard.path)
        sync_folder(self._folder)
        self._whole.add(shard.path)
        self._file = self._open_shard = None

    def _finish(self) -> None:
        """The index, for more than one shard."""
        missing = [name for name in self._shard_of if not self.done(name)]
        assert not missing, f"never written: {missing[:5]}"
        if len(self._shards) == 1:
            return
        total = sum(shard.file_bytes - len(shard.header) for shard in self._shards)
        weight_map = {name: shard.path.name for name, shard in sorted(self._shard_of.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = self._folder / INDEX
        with explain_os_errors(path, "be written"):
            with _partial(path).open("w", encoding="utf-8") as file:
                file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _partial(path).rename(path)
            sync_folder(self._folder)

    def _clear(self) -> None:
        """Removes what a killed writer left of a shard; other checkpoints are not touched.

        Raises:
          UserError: a file that would become part of this checkpoint.
        """
        ours = {shard.path.name for shard in self._shards}
        for path in sorted(self._folder.iterdir()):
            foreign = path.name.endswith(".safetensors") and path.name not in ours
            foreign |= path.name == INDEX and len(self._shards) == 1
            foreign |= path.name in ours and path not in self._whole
            require(
                not foreign,
                f"{path} belongs to another checkpoint: choose an empty folder, or move it away",
            )
        for path in self._folder.glob(f"*.safetensors{PARTIAL}"):
            path.unlink()


def _groups(plan: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    groups: list[list[Planned]] = [[]]
    filled = 0
    for planned in plan:
        if groups[-1] and filled + _nbytes(planned) > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(planned)
        filled += _nbytes(planned)
    return groups


def _nbytes(planned: Planned) -> int:
    _, dtype, shape = planned
    return math.prod(shape) * dtype.itemsize


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)
