"""The header of a GGUF file: metadata and where each tensor lies, checked before anything is used.

Every count and length is held against the bytes that the file has left before memory is taken for
it, so a damaged or hostile file ends in a sentence at once.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, Keys

from configs.checks import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Alike for little-endian files; version 1 had shorter counts."""
DEFAULT_ALIGNMENT = 32
MOST_ITEMS = 1 << 24
"""Of one array: the largest vocabularies have 2^18 tokens and 2^19 merges."""
LONGEST_HEADER = 1 << 30
"""Bytes; such vocabularies take 20 MB."""
MOST_DIMS = 4
_CHUNK = 1 << 20
_LENGTH = struct.Struct("<Q")

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<u1",
}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies and how it is packed."""

    file: Path
    shape: tuple[int, ...]
    """In numpy's order, the fastest dim last."""
    kind: GGMLQuantizationType
    start: int
    """Its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: Path) -> Header:
    """Of this file alone: see formats/gguf/split_files.py for models in several.

    Raises:
      UserError: no file, no GGUF, or a header that contradicts itself or the file's size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse(_Cursor(path, size, file.read))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name a GGUF file") from error


class _Cursor:
    """Takes values off a file's front, never past its end."""

    def __init__(self, path: Path, size: int, read: Callable[[int], bytes]) -> None:
        self.path, self.size, self.place = path, size, 0
        self._read, self._data, self._start = read, b"", 0

    def fail(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}: download the file again")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.place:
            raise self.fail(
                f"{what} needs {count} bytes at byte {self.place}, but the file ends at {self.size}"
            )
        if self.place + count > LONGEST_HEADER:
            raise self.fail(f"the header is longer than {LONGEST_HEADER} bytes, at {what}")
        begin = self.place - self._start
        if begin + count > len(self._data):
            more = self._read(max(count, _CHUNK))
            self._data, self._start = self._data[begin:] + more, self.place
            begin = 0
            if len(self._data) < count:
                raise self.fail(f"the file became shorter while {what} was read")
        self.place += count
        return self._data[begin : begin + count]

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q", f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is no UTF-8 text ({error})") from error

    def texts(self, count: int, what: str) -> list[str]:
        """As many texts as `text` would give: vocabularies have 100,000s, which it would take a
        while over."""
        made: list[str] = []
        while len(made) < count:
            made.append(self.text(what))  # brings the next bytes, and finds what is wrong
            data, begin = self._data, self.place - self._start
            while len(made) < count and begin + _LENGTH.size <= len(data):
                end = begin + _LENGTH.size + _LENGTH.unpack_from(data, begin)[0]
                if end > len(data) or self._start + end > LONGEST_HEADER:
                    break
                try:
                    made.append(data[begin + _LENGTH.size : end].decode())
                except UnicodeDecodeError:
                    break
                begin = end
            self.place = self._start + begin
        return made

    def count(self, least_size: int, what: str) -> int:
        """A number of things that take at least `least_size` bytes each."""
        count, left = self.number("<Q", f"the number of {what}"), self.size - self.place
        if count * least_size > left or count > MOST_ITEMS:
            raise self.fail(
                f"it announces {count} {what}, of which {min(left // least_size, MOST_ITEMS)} can "
                f"be in the {left} bytes that are left"
            )
        return count


def _parse(cursor: _Cursor) -> Header:
    magic = cursor.take(4, "the magic number") if cursor.size >= 4 else b""
    if magic != MAGIC:
        raise UserError(
            f"{cursor.path} is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}"
        )
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        why = " (a big-endian file)" if version % 2**16 == 0 else ""
        raise UserError(
            f"{cursor.path} is GGUF version {version}{why}, expected 2 or 3, little-endian: "
            "convert it with a current llama.cpp"
        )
    num_tensors = cursor.count(8 + 1 + 4 + 8 + 4 + 8, "tensors")
    num_keys = cursor.count(8 + 1 + 4 + 1, "metadata keys")
    metadata = _read_metadata(cursor, num_keys)
    return Header(metadata, _read_tensors(cursor, num_tensors, _alignment(cursor, metadata)))


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get(Keys.General.ALIGNMENT, DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and 0 < alignment <= 2**20
    if not is_power or alignment & (alignment - 1):
        raise cursor.fail(
            f"{Keys.General.ALIGNMENT} is {alignment!r}, expected a power of two up to 2^20"
        )
    return alignment


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.text(f"the name of metadata key {i}")
        if key in metadata:
            raise cursor.fail(f"it has the metadata key {key!r} twice")
        metadata[key] = _read_value(cursor, _value_type(cursor, key), key, depth=0)
    return metadata


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I", f"the type of {key!r}")
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise cursor.fail(f"{key!r} has the unknown value type {number}") from error


def _read_value(cursor: _Cursor, kind: GGUFValueType, key: str, depth: int) -> Any:
    if kind in _NUMBERS:
        dtype = np.dtype(_NUMBERS[kind])
        value = np.frombuffer(cursor.take(dtype.itemsize, f"the value of {key!r}"), dtype)
        return _as_python(cursor, value, kind, key)[0]
    if kind == GGUFValueType.STRING:
        return cursor.text(f"the value of {key!r}")
    if depth == 2:
        raise cursor.fail(f"{key!r} has arrays in arrays in arrays, at most two levels are read")
    item = _value_type(cursor, key)
    if item in _NUMBERS:
        dtype = np.dtype(_NUMBERS[item])
        size = cursor.count(dtype.itemsize, f"items of {key!r}") * dtype.itemsize
        values = np.frombuffer(cursor.take(size, f"the items of {key!r}"), dtype)
        return _as_python(cursor, values, item, key)
    is_text = item == GGUFValueType.STRING
    count = cursor.count(8 if is_text else 12, f"items of {key!r}")
    if is_text:
        return cursor.texts(count, f"the value of {key!r}")
    return [_read_value(cursor, item, key, depth + 1) for _ in range(count)]


def _as_python(cursor: _Cursor, values: np.ndarray, kind: GGUFValueType, key: str) -> list[Any]:
    if kind != GGUFValueType.BOOL:
        return values.tolist()
    if values.size and values.max() > 1:
        raise cursor.fail(f"{key!r} has the truth value {values.max()}, expected 0 or 1")
    return values.astype(bool).tolist()


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorPlace]:
    offsets: dict[str, TensorPlace] = {}
    for i in range(count):
        name = cursor.text(f"the name of tensor {i}")
        if name in offsets:
            raise cursor.fail(f"it has the tensor {name!r} twice")
        offsets[name] = _read_tensor(cursor, name)
    data = -(-cursor.place // alignment) * alignment
    tensors = {
        name: dataclasses.replace(place, start=data + place.start)
        for name, place in offsets.items()
    }
    _check_places(cursor, tensors, data, alignment)
    return tensors


def _read_tensor(cursor: _Cursor, name: str) -> TensorPlace:
    """As written: `start` counts from where the data begins."""
    what = f"the shape of {name!r}"
    num_dims = cursor.number("<I", what)
    if not 1 <= num_dims <= MOST_DIMS:
        raise cursor.fail(f"tensor {name!r} has {num_dims} dims, expected 1 to {MOST_DIMS}")
    dims = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, what))
    number = cursor.number("<I", f"the type of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.fail(f"tensor {name!r} has the unknown type {number}") from error
    block, _ = GGML_QUANT_SIZES[kind]
    if min(dims) < 1 or dims[0] % block:
        raise cursor.fail(
            f"tensor {name!r} of type {kind.name} has the shape {dims[::-1]}, expected sizes of at "
            f"least 1 and a last one divisible by {block}"
        )
    start = cursor.number("<Q", f"the place of {name!r}")
    return TensorPlace(cursor.path, dims[::-1], kind, start)


def _check_places(
    cursor: _Cursor, tensors: dict[str, TensorPlace], data: int, alignment: int
) -> None:
    """Aligned, inside the file, and apart from each other."""
    end, before = data, "the header"
    for name, place in sorted(tensors.items(), key=lambda item: item[1].start):
        if (place.start - data) % alignment:
            raise cursor.fail(
                f"tensor {name!r} begins at {place.start - data}, expected a multiple of "
                f"{alignment}"
            )
        if place.start < end:
            raise cursor.fail(f"tensor {name!r} begins at byte {place.start}, inside {before}")
        end, before = place.start + place.num_bytes, repr(name)
        if end > cursor.size:
            raise cursor.fail(
                f"tensor {name!r} of shape {place.shape} ends at byte {end}, but the file ends at "
                f"{cursor.size}"
            )
