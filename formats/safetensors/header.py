"""The header of a safetensors file: what lies where, checked against the file's size alone.

A file is eight bytes (the header's length, little-endian), the header (a JSON object, padded with
spaces), and the tensors' bytes: https://github.com/huggingface/safetensors#format. Files come from
strangers, so that nothing the header says is believed before it was compared with the file's size.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from configs.checks import UserError, require

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
"""By their names in files, in the order of the public library; the last comes first in a file."""

MAX_JSON_BYTES = 100_000_000
"""A longer header or index is refused, as the public library does; DeepSeek-V3's index has 9 MB."""

MAX_DIMS = 32
_MAX_BYTES = 2**62  # a tensor above this would overflow numpy's sizes
_METADATA = "__metadata__"
_KEYS = ("dtype", "shape", "data_offsets")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its bytes are [begin, end) of the file."""

    name: str
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path, file: BinaryIO, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their bytes, checked; no tensor is read.

    Args:
      file: open at its beginning.
      file_bytes: its size.
    Raises:
      UserError: anything in the header that doesn't fit the format or the file.
    """
    start = file.read(8)
    require(
        len(start) == 8,
        f"{path} has {file_bytes} bytes, and a safetensors file begins with 8 bytes of header "
        "length: it is empty or truncated, get it again",
    )
    length = int.from_bytes(start, "little")
    require(
        length <= file_bytes - 8,
        f"{path} says its header has {length} bytes, but the file has {file_bytes}: it is "
        "truncated or no safetensors file, get it again",
    )
    require(
        length <= MAX_JSON_BYTES,
        f"{path} says its header has {length} bytes, more than the {MAX_JSON_BYTES} allowed: "
        "it is damaged, or no safetensors file",
    )
    text = file.read(length)
    require(len(text) == length, f"{path} became shorter while it was read: get it again")
    return _parse_header(path, text, data_bytes=file_bytes - 8 - length)


def _parse_header(path: Path, text: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    where = f"the header of {path}"
    require(text[:1] == b"{", f"{where} begins with {quote(text[:8])}: it is no safetensors file")
    entries = parse_object(text, where)
    metadata = entries.pop(_METADATA, {})
    require(
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()),
        f"{where}: {_METADATA} is {quote(metadata)}, and must be an object of strings",
    )
    infos = [_tensor_info(path, name, entry) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_layout(path, infos, data_bytes)
    base = 8 + len(text)
    moved = (dataclasses.replace(i, begin=base + i.begin, end=base + i.end) for i in infos)
    return {info.name: info for info in moved}


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    """One entry of the header, its offsets still counted from the header's end."""
    where = f"{path}: tensor {quote(name)}"
    require(
        isinstance(entry, dict) and sorted(entry) == sorted(_KEYS),
        f"{where} is described by {quote(entry)}, and needs dtype, shape and data_offsets",
    )
    dtype_name, shape, offsets = (entry[key] for key in _KEYS)
    require(
        isinstance(dtype_name, str) and dtype_name in DTYPES,
        f"{where} has dtype {quote(dtype_name)}; those that can be read are {', '.join(DTYPES)}",
    )
    dtype = DTYPES[dtype_name]
    require(
        _are_counts(shape) and len(shape) <= MAX_DIMS,
        f"{where} has shape {quote(shape)}, and needs at most {MAX_DIMS} whole numbers from 0 up",
    )
    # Zeros count as one here: numpy refuses [0, 2**62, 2**62] too.
    require(
        math.prod(max(size, 1) for size in shape) * dtype.itemsize <= _MAX_BYTES,
        f"{where} has shape {quote(shape)}, more than any file holds",
    )
    require(
        _are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
        f"{where} has data_offsets {quote(offsets)}, and needs two whole numbers, first <= second",
    )
    begin, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    require(
        end - begin == needed,
        f"{where} is {dtype_name} {shape} and needs {needed} bytes, but its data_offsets "
        f"{quote(offsets)} hold {quote(end - begin)}",
    )
    return TensorInfo(name, path, dtype, tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_layout(path: Path, infos: Sequence[TensorInfo], data_bytes: int) -> None:
    """Tensors must fill the bytes after the header without overlap or hole."""
    position, before = 0, "the header's end"
    for info in infos:
        where = f"{path}: tensor {quote(info.name)}"
        kind = "overlap with" if info.begin < position else "leave a hole after"
        require(
            info.begin == position,
            f"{where} has data_offsets [{info.begin}, {info.end}], which {kind} {before} "
            f"at byte {position}: the file is damaged",
        )
        require(
            info.end <= data_bytes,
            f"{where} needs the bytes up to {info.end} after the header, but the file holds "
            f"{data_bytes}: it is truncated, get it again",
        )
        position, before = info.end, f"tensor {quote(info.name)}"
    require(
        position == data_bytes,
        f"{path} holds {data_bytes} bytes after its header, but its tensors fill {position}: "
        "the file is damaged, get it again",
    )


def encode_header(
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and each tensor's place in it.

    Tensors lie as the public library lays them, largest dtype first and then by name, so that each
    is aligned to its own dtype; the header is padded to 8 bytes with spaces.
    """
    dtypes = list(DTYPES.values())
    order = sorted(tensors, key=lambda name: (-dtypes.index(tensors[name][0]), name))
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        begins[name], end = position, position + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": list(DTYPES)[dtypes.index(dtype)],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: base + begin for name, begin in begins.items()}


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys occur once.

    Raises:
      UserError: no JSON, no object, a repeated key, or nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise UserError(f"{where} has {quote(name)} twice: the file is damaged")
            entries[name] = value
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} is no JSON ({reason[:100]}): the file is damaged") from None
    require(
        isinstance(entries, dict),
        f"{where} is {quote(entries)}, and must be a JSON object: the file is damaged",
    )
    return entries


def quote(value: Any) -> str:
    """What a file said, short and printable, whatever characters it put there."""
    with contextlib.suppress(ValueError, RecursionError):  # numbers of 10,000 digits and the like
        text = ascii(value)
        return text if len(text) <= 120 else text[:100] + "..."
    return f"a {type(value).__name__} that can't be printed"


@contextlib.contextmanager
def explain_os_errors(path: Path, action: str) -> Iterator[None]:
    """
    Raises:
      UserError: the operating system refused; `action` says what was tried, as in "be read".
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't {action}: {error.strerror or error}") from error
