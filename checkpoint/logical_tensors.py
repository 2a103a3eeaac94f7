"""The tensors of a checkpoint as the model means them: scales applied, finite, in the dtype asked.

A quantised weight is stored as two tensors; each tensor of the files belongs to exactly one of
those presented here, or opening ends with its name. What `quantization_config` may say:

    fp8    NAME (float8) and NAME_scale_inv        presented as NAME
           X.weight (float8, or pairs of E2M1 in int8) and X.scale (DeepSeek-V4)
                                                   presented as X.weight
    mxfp4  NAME_blocks and NAME_scales [E, N, ..]  presented as NAME [E, K, N]: the last two dims
           are swapped, as transformers holds the weights that gpt-oss stores so
    compressed-tensors  NAME_packed, NAME_scale [N, S] and NAME_shape, or NAME (float8) and
           NAME_scale                              presented as NAME
    modelopt, and NVFP4 of compressed-tensors      see checkpoint/scaled_pairs.py

Decoding goes by rows read from the file: beside the result there are a few blocks of rows.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import ml_dtypes
import numpy as np

from checkpoint.scaled_pairs import (
    ACTIVATIONS,
    DIVISOR,
    FACTOR,
    I8,
    U8,
    ScaledPair,
    float8_pair,
    float_scales,
    packed_pair,
)
from configs.checks import require
from formats.block_floats import (
    E8M0,
    FP8,
    GROUP,
    decode_fp4,
    decode_fp8,
    decode_mxfp4,
    fp8_scales_shape,
)
from formats.packed_ints import unpack_ints
from formats.safetensors.header import TensorInfo, quote
from formats.safetensors.reader import TensorFiles

SCALE_INV, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
V4_SCALE, WEIGHT = ".scale", ".weight"
PACKED, SCALE, SHAPE, ZERO_POINT = "_packed", "_scale", "_shape", "_zero_point"

_CHUNK = 2**22  # values at a time
_PACKED_ONLY = (FP8, E8M0, np.dtype(ml_dtypes.float8_e5m2))
_FP8_SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), E8M0)
Block = tuple[int, int]
Method = Literal["fp8", "mxfp4", "compressed-tensors", "modelopt"]
"""A quant_method of config.json."""


@dataclasses.dataclass(frozen=True)
class _Logical:
    """One tensor presented: what it is read from, and how (`method` None: as it is)."""

    shape: tuple[int, ...]
    method: Method | None
    values: TensorInfo
    scales: TensorInfo | None = None
    pair: ScaledPair | None = None
    """Of a weight in modelopt's form, or its like."""


class LogicalTensors:
    """Decoded tensors by their logical names."""

    def __init__(self, files: TensorFiles, quantization: Mapping[str, Any] | None) -> None:
        """Pairs weights with scales and checks their shapes and dtypes; reads nothing.

        Args:
          quantization: config.json's `quantization_config`, None if it has none.
        Raises:
          UserError: another method, a weight without scale or a scale without weight, or shapes
            that don't belong together.
        """
        self._files = files
        method = _method(quantization)
        self._block: Block = (1, 1)
        if method == "fp8":
            self._block = fp8_block(quantization or {})
            self._tensors = _pair_fp8(files.tensors, self._block)
        elif method == "mxfp4":
            self._tensors = _pair_mxfp4(files.tensors)
        elif method == "compressed-tensors":
            self._tensors = _pair_compressed(files)
        elif method == "modelopt":
            self._tensors = _pair_modelopt(files.tensors)
        elif method is None:
            self._tensors = {n: _plain(info, method) for n, info in files.tensors.items()}
        else:
            assert_never(method)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def sources(self, name: str) -> tuple[str, ...]:
        """The names in the files of what the tensor is read from."""
        tensor = self._tensors[name]
        factor = None if tensor.pair is None else tensor.pair.factor
        parts = (tensor.values, tensor.scales, factor)
        return tuple(info.name for info in parts if info is not None)

    def file(self, name: str) -> Path:
        """The file that holds the tensor; its values, if the scales lie elsewhere."""
        return self._tensors[name].values.file

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """A whole tensor, decoded.

        Raises:
          UserError: NaN or infinity in `dtype`, or files that changed since they were opened.
        """
        shape = self.shapes[name]
        if shape:
            return self.read_rows(name, 0, shape[0], dtype)
        value = self._files.read(name).astype(dtype)
        self._refuse_non_finite(name, value.reshape(1), 0)
        return value

    def read_rows(self, name: str, start: int, stop: int, dtype: Any = np.float32) -> np.ndarray:
        """Rows [start, stop) of the first dim, decoded; otherwise as `read`."""
        tensor, dtype = self._tensors[name], np.dtype(dtype)
        is_integer = tensor.values.dtype.kind in "biu" and tensor.scales is None
        assert is_integer or dtype.kind not in "biu", f"{name} has fractions"
        if tensor.method is None and dtype == tensor.values.dtype:
            rows = self._files.read_rows(name, start, stop)
        else:
            rows = self._decode(tensor, start, stop, dtype)
        self._refuse_non_finite(name, rows, start)
        return rows

    def _decode(self, tensor: _Logical, start: int, stop: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Rows of the first dim, made in pieces."""
        rows = np.empty((stop - start, *tensor.shape[1:]), dtype)
        with np.errstate(over="ignore"):  # beyond the dtype: infinite, and refused by the caller
            if tensor.method == "mxfp4":
                self._fill_mxfp4(tensor, start, rows)
            else:
                for part in _parts(rows.shape):
                    rows[part] = self._piece(tensor, start + part.start, start + part.stop)
        return rows

    def _piece(self, tensor: _Logical, start: int, stop: int) -> np.ndarray:
        values = self._files.read_rows(tensor.values.name, start, stop)
        if tensor.scales is None:
            return values
        if tensor.pair is not None:
            return self._scaled(tensor.pair, values, start, stop)
        if tensor.method == "compressed-tensors":
            scales = self._files.read_rows(tensor.scales.name, start, stop).astype(np.float32)
            if tensor.values.dtype != FP8:
                values = unpack_ints(values, 32 * values.shape[1] // tensor.shape[1])
            block = tensor.shape[1] // scales.shape[1]
            return values.astype(np.float32) * np.repeat(scales, block, axis=1)
        if values.ndim > 2:
            scales = self._files.read_rows(tensor.scales.name, start, stop)
            return decode_fp8(values, scales, self._block)
        first, last = start // self._block[0], -(-stop // self._block[0])
        scales = self._files.read_rows(tensor.scales.name, first, last)
        return decode_fp8(values, scales, self._block, first_row=start - first * self._block[0])

    def _scaled(self, pair: ScaledPair, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        is_one = pair.scales.shape in ((), (1,))
        if is_one:
            scales = self._files.read(pair.scales.name).reshape(1, 1)
        else:
            scales = self._files.read_rows(pair.scales.name, start, stop)
        factor = None if pair.factor is None else self._files.read(pair.factor.name)
        scales = float_scales(scales, factor, divides=pair.divides)
        if pair.values.dtype != FP8:
            return decode_fp4(values.view(np.uint8), scales)
        block = pair.shape[1] // scales.shape[1]
        return values.astype(np.float32) * np.repeat(scales, block, axis=1)

    def _fill_mxfp4(self, tensor: _Logical, start: int, rows_EKN: np.ndarray) -> None:
        assert tensor.scales is not None
        for e, expert_KN in enumerate(rows_EKN, start):
            blocks_NG = self._files.read_rows(tensor.values.name, e, e + 1)[0]
            scales_NG = self._files.read_rows(tensor.scales.name, e, e + 1)[0]
            for part in _parts(expert_KN.T.shape):
                expert_KN[:, part] = decode_mxfp4(blocks_NG[part], scales_NG[part]).T

    def _refuse_non_finite(self, name: str, rows: np.ndarray, start: int) -> None:
        if rows.dtype.kind in "biu":
            return
        count, first = 0, None
        for part in _parts(rows.shape):
            bad = ~np.isfinite(rows[part])
            found = int(np.count_nonzero(bad))
            if found and first is None:
                row, *rest = (int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
                first = (start + part.start + row, *rest)
            count += found
        tensor = self._tensors[name]
        require(
            count == 0,
            f"{tensor.values.file}: tensor {quote(name)} has {count} values that are NaN or "
            f"infinite as {rows.dtype}, the first at {list(first or ())}: the file is damaged, get "
            "it again",
        )


def _method(quantization: Mapping[str, Any] | None) -> Method | None:
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    require(
        method in get_args(Method),
        f"quantization_config is {quote(quantization)}; the quant_method that can be read is fp8 "
        "(float8 blocks) or mxfp4 or compressed-tensors or modelopt: get the checkpoint in one of "
        "them, or in bfloat16",
    )
    return method


def fp8_block(quantization: Mapping[str, Any]) -> Block:
    """Rows and columns that share a scale.

    Raises:
      UserError: not said, or another kind of float8.
    """
    block = quantization.get("weight_block_size")
    require(
        isinstance(block, list)
        and len(block) == 2
        and all(type(b) is int and b > 0 for b in block),
        f"quantization_config: weight_block_size is {quote(block)}, and must be two whole numbers "
        "above 0, as in [128, 128]",
    )
    for key, needed in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        found = quantization.get(key, needed)
        require(
            found == needed,
            f"quantization_config: {key} is {quote(found)}; only {needed} can be read",
        )
    assert isinstance(block, list)  # for the type checker
    return block[0], block[1]


def _plain(info: TensorInfo, method: str | None) -> _Logical:
    needed = "a quantization_config with fp8" if method is None else "one with fp8"
    require(
        info.dtype not in _PACKED_ONLY,
        f"{info.file}: tensor {quote(info.name)} is {info.dtype}, which needs scales: config.json "
        f"must have {needed}, and the files its {quote(info.name + SCALE_INV)}",
    )
    return _Logical(info.shape, None, info)


def _pair_fp8(tensors: Mapping[str, TensorInfo], block: Block) -> dict[str, _Logical]:
    logical = {}
    for name, info in tensors.items():
        weight_name, v4_scale = _scaled_weight(name, tensors), name.removesuffix(WEIGHT) + V4_SCALE
        if weight_name is not None:
            weight = tensors.get(weight_name)
            require(
                weight is not None and weight.dtype in (FP8, I8),
                f"{info.file}: {quote(name)} is the scale of a float8 weight, and "
                f"{quote(weight_name)} is {weight.dtype if weight else 'missing'}: get the files "
                "again",
            )
        elif info.dtype == FP8:
            scales = tensors.get(name + SCALE_INV, tensors.get(v4_scale))
            logical[name] = _fp8_pair(info, scales, block)
        elif info.dtype == I8 and name.endswith(WEIGHT):
            pair = packed_pair(info, name, tensors, FACTOR, v4_scale)
            logical[name] = _Logical(pair.shape, "fp8", info, pair.scales, pair)
        else:
            logical[name] = _plain(info, "fp8")
    return logical


def _scaled_weight(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight that this tensor is the scale of; None: it is no scale."""
    if name.endswith(SCALE_INV):
        return name.removesuffix(SCALE_INV)
    weight = name.removesuffix(V4_SCALE) + WEIGHT
    return weight if name.endswith(V4_SCALE) and weight in tensors else None


def _fp8_pair(weight: TensorInfo, scales: TensorInfo | None, block: Block) -> _Logical:
    where = f"{weight.file}: float8 tensor {quote(weight.name)}"
    require(
        scales is not None, f"{where} has no scales: {quote(weight.name + SCALE_INV)} is missing"
    )
    require(
        len(weight.shape) >= 2,
        f"{where} has shape {list(weight.shape)}, and needs two dims or more",
    )
    assert scales is not None  # for the type checker
    needed = fp8_scales_shape(weight.shape, block)
    require(
        scales.shape == needed and scales.dtype in _FP8_SCALES,
        f"{where} of shape {list(weight.shape)}, in blocks of {list(block)}, needs scales of shape "
        f"{list(needed)} in F32, BF16 or F8_E8M0; {quote(scales.name)} is {scales.dtype} "
        f"{list(scales.shape)}",
    )
    return _Logical(weight.shape, "fp8", weight, scales)


def _pair_mxfp4(tensors: Mapping[str, TensorInfo]) -> dict[str, _Logical]:
    logical = {}
    for name, info in tensors.items():
        if name.endswith(BLOCKS):
            stem = name.removesuffix(BLOCKS)
            require(
                stem not in tensors,
                f"{info.file}: {quote(name)} and {quote(stem)} are the same tensor twice",
            )
            logical[stem] = _mxfp4_pair(info, tensors.get(stem + SCALES))
        elif name.endswith(SCALES):
            blocks = name.removesuffix(SCALES) + BLOCKS
            require(
                blocks in tensors,
                f"{info.file}: {quote(name)} is the scale of {quote(blocks)}, which is missing: "
                "get the files again",
            )
        else:
            logical[name] = _plain(info, "mxfp4")
    return logical


def _mxfp4_pair(blocks: TensorInfo, scales: TensorInfo | None) -> _Logical:
    where = f"{blocks.file}: MXFP4 tensor {quote(blocks.name)}"
    require(scales is not None, f"{where} has no scales: the tensor named ..{SCALES} is missing")
    assert scales is not None  # for the type checker
    bytes_dtype = np.dtype(np.uint8)
    require(
        len(blocks.shape) == 4 and blocks.shape[-1] == GROUP // 2 and blocks.dtype == bytes_dtype,
        f"{where} is {blocks.dtype} {list(blocks.shape)}, and must be U8 [experts, rows, groups, "
        f"{GROUP // 2}]",
    )
    require(
        scales.shape == blocks.shape[:-1] and scales.dtype == bytes_dtype,
        f"{where} needs scales of U8 {list(blocks.shape[:-1])}; {quote(scales.name)} is "
        f"{scales.dtype} {list(scales.shape)}",
    )
    experts, rows, groups, _ = blocks.shape
    return _Logical((experts, groups * GROUP, rows), "mxfp4", blocks, scales)


def _pair_compressed(files: TensorFiles) -> dict[str, _Logical]:
    """Packed integers and float8 with their scales, symmetric ones alone."""
    logical: dict[str, _Logical] = {}
    for name, info in files.tensors.items():
        if name.endswith(ACTIVATIONS):
            continue
        stem = name.removesuffix(PACKED) if name.endswith(PACKED) else name
        if name.endswith(PACKED) and info.dtype == U8:
            pair = packed_pair(info, stem, files.tensors, DIVISOR)
            logical[stem] = _Logical(pair.shape, "compressed-tensors", info, pair.scales, pair)
            continue
        if info.dtype == FP8 and _has_block_powers(files.tensors.get(name + SCALE)):
            pair = float8_pair(info, files.tensors)
            logical[name] = _Logical(pair.shape, "compressed-tensors", info, pair.scales, pair)
            continue
        is_rounded = name.endswith(PACKED) or (info.dtype == FP8 and not _is_scale(name, files))
        if not is_rounded:
            base = name.removesuffix(DIVISOR).removesuffix(SCALE).removesuffix(SHAPE)
            if base == name or not {base, base + PACKED} & set(files.tensors):
                logical[name] = _plain(info, "compressed-tensors")
            continue
        scales, shape = files.tensors.get(stem + SCALE), info.shape
        where = f"{info.file}: {quote(name)}"
        require(
            stem + ZERO_POINT not in files.tensors,
            f"{where} has a zero point, which is not read: get the checkpoint in bfloat16",
        )
        if name.endswith(PACKED):
            require(stem + SHAPE in files.tensors, f"{where} has no {quote(stem + SHAPE)}")
            shape = tuple(int(x) for x in files.read(stem + SHAPE))
        per_word = shape[1] // info.shape[1] if len(shape) == 2 and info.shape[1] else 0
        require(
            scales is not None
            and len(shape) == 2
            and len(scales.shape) == 2
            and scales.shape[0] == shape[0]
            and shape[1] % max(scales.shape[1], 1) == 0
            and (info.dtype == FP8 or per_word in (4, 8)),
            f"{where} of shape {list(shape)} needs {quote(stem + SCALE)} [rows, blocks] and 4 or 8 "
            "bits a weight: get the checkpoint in bfloat16",
        )
        logical[stem] = _Logical(shape, "compressed-tensors", info, scales)
    return logical


def _has_block_powers(scales: TensorInfo | None) -> bool:
    return scales is not None and scales.dtype in (U8, E8M0)


def _is_scale(name: str, files: TensorFiles) -> bool:
    """Whether a float8 tensor is the scales of a packed one."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) + PACKED in files.tensors


def _pair_modelopt(tensors: Mapping[str, TensorInfo]) -> dict[str, _Logical]:
    """Weights of 4 or 8 bits with their scales; those of activations are passed over."""
    logical: dict[str, _Logical] = {}
    for name, info in tensors.items():
        base = name.removesuffix(FACTOR).removesuffix(SCALE)
        if name.endswith(ACTIVATIONS) or (base != name and base in tensors):
            continue
        if info.dtype == U8:
            pair = packed_pair(info, name, tensors, FACTOR)
        elif info.dtype == FP8:
            pair = float8_pair(info, tensors)
        else:
            logical[name] = _plain(info, "modelopt")
            continue
        logical[name] = _Logical(pair.shape, "modelopt", info, pair.scales, pair)
    return logical


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dim with about _CHUNK values each."""
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))
