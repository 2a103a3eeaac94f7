"""Writing GGUF files for llama.cpp, one tensor in memory at a time."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

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

Quantization = Literal["F16", "Q8_0"]
Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]
"""Name, shape in numpy's order, and what reads it as float32 when its turn comes."""

_ENTRIES = 1 << 22
"""Quantised at once."""
_FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: Sequence[Tensor],
    quantization: Quantization,
) -> None:
    """Writes a model under another name and gives it its own when it is whole.

    Args:
      metadata: with "general.architecture". Whole numbers become uint32, or int32 in a list (as
        llama.cpp asks for token types); floats float32; empty lists are left out.
      quantization: of matrices. Vectors, biases and routers are float32 in either, as llama.cpp
        computes with them; Q8_0 needs rows of whole blocks of 32, others are F16.
    Raises:
      UserError: a value that float16 can't hold, or a disk that can't.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write(partial, metadata, tensors, quantization)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(
    path: Path, metadata: dict[str, Any], tensors: Sequence[Tensor], quantization: Quantization
) -> None:
    writer = GGUFWriter(path, metadata[Keys.General.ARCHITECTURE])
    try:
        _add_metadata(writer, metadata, quantization)
        kinds = [_kind(name, shape, quantization) for name, shape, _ in tensors]
        for (name, shape, _), kind in zip(tensors, kinds, strict=True):
            block, size = GGML_QUANT_SIZES[kind]
            count = math.prod(shape) // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, shape, read), kind in zip(tensors, kinds, strict=True):
            tensor = read()
            assert tensor.shape == tuple(shape), f"{name}: {tensor.shape} is not {shape}"
            writer.write_tensor_data(_packed(name, tensor, kind))
        writer.flush()
    finally:
        writer.close()


def _add_metadata(writer: GGUFWriter, metadata: dict[str, Any], quantization: Quantization) -> None:
    own = {
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
        Keys.General.FILE_TYPE: int(_FILE_TYPES[quantization]),
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
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight")):
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
    if kind == GGMLQuantizationType.F32:
        limit = float(np.finfo(np.float32).max)
    else:
        limit = float(np.finfo(np.float16).max) * (1 if block == 1 else 127)
    if not np.abs(part).max(initial=0) <= limit:
        raise UserError(
            f"{name} has the value {np.abs(part).max()}, and {kind.name} holds at most {limit}: "
            "the model can't be written like this"
        )
