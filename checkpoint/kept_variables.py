"""Variables as a device's kernels read them, in one file: for the next start, not to be handed on.

arrays     one after the other, each at a multiple of 64 bytes; a group of them at one of 4,096
header     JSON: what the file is of, the tree, the arrays, the groups
tail       its length and SHA-256

A file is read only by who says the same of it as who wrote it (`of`), so its form may change with
the code. Whatever is cut off or changed in it is found: the header by its hash, each array by a sum
of its words. So nothing waits for the disk when it is written.
"""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.assemble import PIECE_BYTES, own_pages
from kernels.quantize import QTensor

TAIL = struct.Struct("<Q32s")
ARRAY_BYTES, GROUP_BYTES = 64, 4096
"""Multiples at which an array and a group begin: what XLA takes over without a copy, and a page."""
ARRAYS_OF_QTENSOR = ("values", "scales", "offsets")


class DamagedFile(Exception):
    """A file that is not as it was written; says how."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the file."""

    dtype: str
    shape: list[int]
    offset: int
    """In the file."""
    size: int
    checksum: int

    def of(self, memory: np.ndarray, start: int) -> np.ndarray:
        """The array, in bytes that were read from a place of the file on.

        Raises:
          DamagedFile: it is not what was written.
        """
        data = memory[self.offset - start : self.offset - start + self.size]
        if _checksum(data) != self.checksum:
            raise DamagedFile("bytes are not as they were written")
        return data.view(jnp.dtype(self.dtype)).reshape(self.shape)


def write_kept(file: BinaryIO, of: str, variables: Any) -> None:
    """Writes variables of one device.

    Args:
      variables: nested dicts of arrays and QTensors.
      of: says what they are, and how they were made.
    Raises:
      OSError: the disk refuses.
    """
    held: list[jax.Array] = []
    tree = _described(variables, held)
    arrays: list[dict[str, Any]] = []
    groups: list[list[int]] = []
    for x in held:
        if not groups or file.tell() - groups[-1][0] + x.nbytes > PIECE_BYTES:
            _fill_up(file, GROUP_BYTES)
            groups.append([file.tell(), file.tell(), 0])
        _fill_up(file, ARRAY_BYTES)
        data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        array = _Array(x.dtype.name, list(x.shape), file.tell(), data.size, _checksum(data))
        arrays.append(dataclasses.asdict(array))
        file.write(data.data)
        groups[-1][1:] = file.tell(), len(arrays)
    header = json.dumps({"of": of, "tree": tree, "arrays": arrays, "groups": groups}).encode()
    file.write(header)
    file.write(TAIL.pack(len(header), hashlib.sha256(header).digest()))


def read_kept(path: Path, of: str) -> Any:
    """The variables on the first device; None where the file is of something else.

    Each group is read straight into pages that the arrays then have for themselves: a mapping's
    pages are small, and weights are read again for every token.

    Raises:
      OSError: there is none, or it can't be read.
      DamagedFile: it is not as it was written.
    """
    with path.open("rb", buffering=0) as file:
        header = _read_header(file)
        if header["of"] != of:
            return None
        arrays, made = [_Array(**array) for array in header["arrays"]], []
        device = jax.local_devices()[0]
        for start, stop, last in header["groups"]:
            memory = _read(file, start, stop - start)
            parts = [array.of(memory, start) for array in arrays[len(made) : last]]
            made += jax.block_until_ready(jax.device_put(parts, device))
    return _restored(header["tree"], made)


def _described(tree: Any, held: list[jax.Array]) -> Any:
    """The tree in JSON: a dict as one, an array as its number, a QTensor as a list, None as such.

    Args:
      held: gets the arrays.
    """
    if isinstance(tree, dict):
        return {name: _described(part, held) for name, part in tree.items()}
    if isinstance(tree, QTensor):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        arrays = [_described(fields.pop(name), held) for name in ARRAYS_OF_QTENSOR]
        return [*arrays, fields]
    if tree is None:  # a QTensor's offsets
        return None
    held.append(tree)
    return len(held) - 1


def _restored(tree: Any, arrays: list[jax.Array]) -> Any:
    """The inverse of `_described`."""
    if isinstance(tree, dict):
        return {name: _restored(part, arrays) for name, part in tree.items()}
    if isinstance(tree, int):
        return arrays[tree]
    *numbers, told = tree
    fields: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in told.items()}
    for name, number in zip(ARRAYS_OF_QTENSOR, numbers, strict=True):
        fields[name] = None if number is None else arrays[number]
    return QTensor(**fields)


def _fill_up(file: BinaryIO, multiple: int) -> None:
    file.write(bytes(-file.tell() % multiple))


def _checksum(data_B: np.ndarray) -> int:
    """The sum of the words of 8 bytes: 10 times as fast as a CRC, and pages that never reached the
    disk are missing from it."""
    whole = data_B.size // 8 * 8
    words = data_B[:whole].view(np.uint64)
    rest = int.from_bytes(data_B[whole:].tobytes(), "little")
    return (int(words.sum(dtype=np.uint64)) + rest) % 2**64


def _read_header(file: Any) -> dict[str, Any]:
    size = file.seek(0, 2)
    if size < TAIL.size:
        raise DamagedFile("it was cut off")
    length, digest = TAIL.unpack(_read(file, size - TAIL.size, TAIL.size).tobytes())
    if length > size - TAIL.size:
        raise DamagedFile("it was cut off")
    header = _read(file, size - TAIL.size - length, length).tobytes()
    if hashlib.sha256(header).digest() != digest:
        raise DamagedFile("its header is not as it was written")
    return json.loads(header)


def _read(file: Any, start: int, size: int) -> np.ndarray:
    """So many bytes, in pages of their own."""
    memory = own_pages([size], np.dtype(np.uint8))
    file.seek(start)
    done = 0
    while done < size:
        count = file.readinto(memory[done:].data)
        if not count:
            raise DamagedFile("it was cut off")
        done += count
    return memory
