"""Storage of an export's tensors: in one dtype, or packed as their family was released.

Packed, the weights that the family names (families/base.py: `Packed`) are small floats with scales,
two tensors each, and everything else is bfloat16; checkpoint/logical_tensors.py reads the same.

    float8  NAME, and NAME_scale_inv for each block of [128, 128]
    mxfp4   NAME_blocks and NAME_scales [E, N, ..] for NAME [E, K, N]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import ml_dtypes
import numpy as np

from checkpoint.families import FAMILIES
from checkpoint.families.base import Family, Packed, PackedDtype
from checkpoint.logical_tensors import BLOCKS, SCALE_INV, SCALES, fp8_block
from checkpoint.weight_map import TOKEN_EXPERTS, Entry
from configs.checks import UserError, require
from formats.block_floats import FP8, GROUP, encode_fp8, encode_mxfp4, fp8_scales_shape
from formats.safetensors.writer import Planned

PlainDtype = Literal["float32", "bfloat16", "float16"]
ExportDtype = Literal[PlainDtype, PackedDtype]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FP8_BLOCK = (128, 128)
"""Of every released DeepSeek checkpoint."""

_METHODS = {"float8": "fp8", "mxfp4": "mxfp4"}  # config.json's quant_method


@dataclass(frozen=True)
class Storage:
    """Made by `choose_storage`."""

    dtype: PlainDtype
    """Of what is not packed; config.json's dtype."""
    packed: Packed | None = None
    block: tuple[int, int] = FP8_BLOCK
    """float8 only: rows and columns that share a scale."""
    power_of_two: bool = False
    """float8 only: whether scales are powers of two (DeepSeek-V3.1)."""

    def plan(self, entry: Entry) -> list[Planned]:
        """The tensors that an entry is written as: name, dtype, shape.

        Raises:
          UserError: its shape can't be packed.
        """
        name, shape = entry.name, entry.shape
        packing = self._packing(entry)
        if packing is None:
            return [(name, self._plain(entry), shape)]
        if packing == "float8":
            scales = fp8_scales_shape(shape, self.block)
            return [(name, FP8, shape), (name + SCALE_INV, np.dtype(np.float32), scales)]
        if packing == "mxfp4":
            experts, inputs, outputs = shape
            require(
                inputs % GROUP == 0,
                f"{name} has {inputs} inputs, which mxfp4 needs in groups of {GROUP}: export in "
                "bfloat16",
            )
            scales, byte = (experts, outputs, inputs // GROUP), np.dtype(np.uint8)
            return [(name + BLOCKS, byte, (*scales, GROUP // 2)), (name + SCALES, byte, scales)]
        assert_never(packing)

    def encode(self, entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
        """What the tensors of `plan` hold.

        Raises:
          UserError: a value does not fit.
        """
        packing = self._packing(entry)
        if packing is None:
            return [_cast(tensor, self._plain(entry), entry.name)]
        _cast(tensor, tensor.dtype, entry.name)
        if packing == "float8":
            values, scales = encode_fp8(tensor, self.block, power_of_two=self.power_of_two)
            return [values, scales.astype(np.float32)]
        if packing == "mxfp4":
            packed = [encode_mxfp4(np.ascontiguousarray(expert_KN.T)) for expert_KN in tensor]
            return [np.stack(part) for part in zip(*packed, strict=True)]
        assert_never(packing)

    def settings(self) -> dict[str, Any]:
        """config.json's keys, as other engines read them."""
        values: dict[str, Any] = {"dtype": self.dtype, "torch_dtype": self.dtype}
        if self.packed is None:
            return values
        quant_config: dict[str, Any] = {"quant_method": _METHODS[self.packed.dtype]}
        if self.packed.dtype == "float8":
            quant_config |= {
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(self.block),
            }
            quant_config |= {"scale_fmt": "ue8m0"} if self.power_of_two else {}
        elif self.packed.dtype == "mxfp4":
            quant_config["modules_to_not_convert"] = list(self.packed.plain_modules)
        else:
            assert_never(self.packed.dtype)
        return values | {"quantization_config": quant_config}

    def _packing(self, entry: Entry) -> PackedDtype | None:
        if self.packed is None or not self.packed.holds(entry.name):
            return None
        return self.packed.dtype

    def _plain(self, entry: Entry) -> np.dtype[Any]:
        """State that steers the choice of experts stays float32, as DeepSeek ships it, and a table
        of experts integers."""
        if entry.leaf.endswith(TOKEN_EXPERTS):
            return np.dtype(np.int64)
        return DTYPES["float32" if entry.leaf.startswith("router_state.") else self.dtype]


def choose_storage(
    family: Family, dtype: ExportDtype, like: Mapping[str, Any] | None = None
) -> Storage:
    """
    Args:
      like: `quantization_config` of the source, if it has one: what was float8 keeps its blocks and
        its kind of scales, and comes back as it was.
    Raises:
      UserError: a packed dtype that the family is not released in.
    """
    if dtype != "float8" and dtype != "mxfp4":
        return Storage(dtype)
    if family.packed is None or family.packed.dtype != dtype:
        packed = [f.model_type for f in FAMILIES if f.packed and f.packed.dtype == dtype]
        raise UserError(
            f"{family.model_type} is not released in {dtype}, and no engine would read it so: that "
            f"is for {', '.join(packed)}; export in bfloat16"
        )
    if dtype == "float8" and like is not None and like.get("quant_method") == "fp8":
        is_power_of_two = like.get("scale_fmt") == "ue8m0"
        return Storage("bfloat16", family.packed, fp8_block(like), is_power_of_two)
    return Storage("bfloat16", family.packed)


def _cast(tensor: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype, copy=False)
    if not np.isfinite(cast.astype(np.float32, copy=False)).all():
        raise UserError(
            f"{name} has values up to {np.abs(tensor).max():.3g}, which {dtype} can't hold: export "
            "in bfloat16 or float32"
        )
    return cast
