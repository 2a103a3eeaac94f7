"""Writing GGUF files for llama.cpp, one tensor in memory at a time.

The header follows from names, shapes and metadata alone, so a killed writer can go on.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import numpy as np
from gguf import GGUFWriter
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
    LlamaFileType,
)
from gguf.quants import quantize

from configs.checks import UserError
from formats.gguf.blocks import BlockKind
from formats.gguf.header import DEFAULT_ALIGNMENT
from formats.safetensors.header import explain_os_errors

Quantization = Literal["F16", "BF16", "Q8_0"]
Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""Name, shape in numpy's order, and what reads it as float32 when its turn comes."""

MARKED_BYTES = 1 << 28
"""After as many, those before are made to lie on the disk: what a killed writer does again."""
_ENTRIES = 1 << 22
"""Quantised at once."""
_FILE_TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK_FILE_TYPES: dict[BlockKind, LlamaFileType] = {
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
_EXACT = (
    ".bias",
    ".ssm_a",
    ".ssm_d",
    "_norm.weight",
    "ffn_gate_inp.weight",
    "indexer.proj.weight",
    "shortconv.conv.weight",
)
"""How the tensors of several dims end that llama.cpp computes with in float32."""
Encoded = tuple[BlockKind, Callable[[], np.ndarray]]
"""What a tensor's blocks are, and what makes their bytes, [rows, bytes of a row]."""


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: Sequence[Tensor],
    quantization: Quantization,
    progress: Callable[[int], None] = lambda _: None,
    encoded: Mapping[str, Encoded] = MappingProxyType({}),
) -> None:
    """Writes a file, or goes on with one that was to become the same: tensors that are in it are
    not read again. Beside it lies meanwhile how many are, `<path>.done`.

    Args:
      metadata: with "general.architecture". Whole numbers become uint32, or int32 in a list (as
        llama.cpp asks for token types); floats float32; empty lists are left out.
      quantization: of matrices. Vectors, biases and routers are float32 in either, as llama.cpp
        computes with them; Q8_0 needs rows of whole blocks of 32, others are F16.
      progress: is told elements.
      encoded: the tensors that were rounded by others, by name; the rest is as `quantization` says.
    Raises:
      UserError: a value that float16 can't hold, or a disk that can't.
    """
    kinds = [
        GGMLQuantizationType[encoded[name][0]]
        if name in encoded
        else _kind(name, shape, quantization)
        for name, shape, _ in tensors
    ]
    sizes = [_num_bytes(shape, kind) for (_, shape, _), kind in zip(tensors, kinds, strict=True)]
    with explain_os_errors(path, "be written"):
        kind = _main_kind(tensors, encoded)
        file_type = _FILE_TYPES[quantization] if kind is None else _BLOCK_FILE_TYPES[kind]
        header = _header(path, metadata, tensors, kinds, file_type)
        ends = list(itertools.accumulate(map(_padded, sizes), initial=len(header)))
        file, done = _go_on(path, header, ends)
        with file:
            for i, ((name, shape, read), kind) in enumerate(zip(tensors, kinds, strict=True)):
                if i >= done and name in encoded:
                    packed = encoded[name][1]()
                    assert packed.nbytes == sizes[i], f"{name}: {packed.nbytes} bytes"
                    file.write(packed.data)
                elif i >= done:
                    tensor = read()
                    assert tensor.shape == tuple(shape), f"{name}: {tensor.shape} is not {shape}"
                    file.write(_packed(name, tensor, kind).data)
                if i >= done:
                    file.write(bytes(ends[i + 1] - ends[i] - sizes[i]))
                    if ends[i + 1] - ends[done] >= MARKED_BYTES:
                        _mark(path, file, i + 1)
                        done = i + 1
                progress(math.prod(shape))
            file.flush()
            os.fsync(file.fileno())
        _marks(path).unlink(missing_ok=True)


def _header(
    path: Path,
    metadata: dict[str, Any],
    tensors: Sequence[Tensor],
    kinds: Sequence[GGMLQuantizationType],
    file_type: LlamaFileType,
) -> bytes:
    """All that comes before the first tensor."""
    scratch = path.with_name(path.name + ".header")
    writer = GGUFWriter(scratch, metadata[Keys.General.ARCHITECTURE])
    try:
        _add_metadata(writer, metadata, file_type)
        for (name, shape, _), kind in zip(tensors, kinds, strict=True):
            size = _num_bytes(shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = scratch.read_bytes()
    finally:
        writer.close()
        scratch.unlink(missing_ok=True)
    return header.ljust(_padded(len(header)), b"\0")


def _main_kind(tensors: Sequence[Tensor], encoded: Mapping[str, Encoded]) -> BlockKind | None:
    """The kind of blocks that most of the encoded weights have."""
    weights: dict[BlockKind, int] = {}
    for name, shape, _ in tensors:
        if name in encoded:
            kind = encoded[name][0]
            weights[kind] = weights.get(kind, 0) + math.prod(shape)
    return max(weights, key=weights.__getitem__, default=None)


def _go_on(path: Path, header: bytes, ends: Sequence[int]) -> tuple[BinaryIO, int]:
    """The file, open where the next tensor goes, and how many are in it."""
    done = 0
    with contextlib.suppress(OSError, ValueError):
        done = int(_marks(path).read_text())
    if done and path.is_file() and done < len(ends) and path.stat().st_size >= ends[done]:
        file = path.open("r+b")
        if file.read(len(header)) == header:
            file.truncate(ends[done])
            file.seek(ends[done])
            return file, done
        file.close()
    file = path.open("wb")
    file.write(header)
    return file, 0


def _mark(path: Path, file: BinaryIO, done: int) -> None:
    """Notes how many tensors are on the disk, when they are."""
    file.flush()
    os.fsync(file.fileno())
    _marks(path).write_text(str(done))


def _marks(path: Path) -> Path:
    return path.with_name(path.name + ".done")


def _num_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _add_metadata(writer: GGUFWriter, metadata: dict[str, Any], file_type: LlamaFileType) -> None:
    own = {
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
        Keys.General.FILE_TYPE: int(file_type),
    }
    for key, value in (metadata | own).items():
        if key == Keys.General.ARCHITECTURE or value == []:
            continue
        writer.add_key_value(key, value, _value_type(value))


def _value_type(value: Any) -> GGUFValueType:
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    return kinds[type(value)]


def _kind(name: str, shape: tuple[int, ...], quantization: Quantization) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith(_EXACT) or ".ssm_conv1d" in name:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[quantization]
    block, _ = GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _packed(name: str, tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The tensor's bytes, [rows, bytes of a row]."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    step = max(1, _ENTRIES // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        _check_range(name, part, block, kind)
        packed[start : start + step] = quantize(part, kind).view(np.uint8)
    return packed


def _check_range(name: str, part: np.ndarray, block: int, kind: GGMLQuantizationType) -> None:
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        limit = float(np.finfo(np.float32).max)
    else:
        limit = float(np.finfo(np.float16).max) * (1 if block == 1 else 127)
    if not np.abs(part).max(initial=0) <= limit:
        raise UserError(
            f"{name} has the value {np.abs(part).max()}, and {kind.name} holds at most {limit}: "
            "the model can't be written like this"
        )
