"""Rounded weights in Hugging Face form, as the library compressed-tensors and vLLM read them.

    int4, int8   NAME_packed int32 [N, K * bits / 32], NAME_scale [N, S], NAME_shape: pack-quantized
    fp8          NAME float8 [N, K], NAME_scale [N, 1]: float-quantized

K inputs, N outputs, S blocks of inputs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpoint.export_dtype import DTYPES, PlainDtype, Storage
from checkpoint.logical_tensors import PACKED, SCALE, SHAPE
from checkpoint.rounded import BITS, RoundedParameter, rounded_at, rounded_leaf
from checkpoint.weight_map import Entry
from configs.checks import require
from formats.block_floats import FP8
from formats.packed_ints import pack_ints
from formats.safetensors.writer import Planned

METHOD = "compressed-tensors"
Kind = tuple[str, int]
"""Format and inputs that share a scale, 0 for all."""


@dataclasses.dataclass(frozen=True)
class CompressedStorage:
    """As checkpoint.export_dtype.Storage, of a model with rounded weights."""

    dtype: PlainDtype
    leaves: Mapping[str, Any]
    """The model's variables by path (checkpoint.weight_map.flatten)."""
    entries: Sequence[Entry]

    def plan(self, entry: Entry) -> list[Planned]:
        """The tensors that an entry is written as: name, dtype, shape.

        Raises:
          UserError: a weight that has no such form.
        """
        found = self._rounded(entry)
        if found is None:
            return self._plain.plan(entry)
        name, scales = entry.name, self._scales_shape(entry, found)
        scale: Planned = (name + SCALE, DTYPES[self.dtype], scales)
        if found.format == "fp8":
            return [(name, FP8, entry.shape), scale]
        each = 32 // BITS[found.format]
        packed = (entry.shape[0], entry.shape[1] // each)
        return [
            (name + PACKED, np.dtype(np.int32), packed),
            scale,
            (name + SHAPE, np.dtype(np.int64), (2,)),
        ]

    def encode(self, entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
        """What the tensors of `plan` hold."""
        if self._rounded(entry) is None:
            return self._plain.encode(entry, tensor)
        part = rounded_at(self.leaves[entry.leaf], entry.place)
        assert part is not None
        codes_NK, scales_NK = entry.to_public(part.codes), entry.to_public(part.scales)
        scales_NS = scales_NK[:, :: part.block].astype(DTYPES[self.dtype])
        if part.format == "fp8":
            return [codes_NK, scales_NS]
        shape = np.asarray(entry.shape, np.int64)
        return [pack_ints(codes_NK, BITS[part.format]), scales_NS, shape]

    def settings(self) -> dict[str, Any]:
        """config.json's keys, as other engines read them."""
        kinds: dict[Kind, list[str]] = {}
        plain = []
        for entry in self.entries:
            module = entry.name.removesuffix(".weight")
            found = self._rounded(entry)
            if found is not None:
                block = 0 if found.scales_NS.shape[-1] == 1 else found.block
                kinds.setdefault((found.format, block), []).append(module)
            elif len(entry.shape) == 2 and "embed" not in module:
                plain.append(module)
        is_alone = len(kinds) == 1
        groups = {
            f"group_{i}": _group(kind, ["Linear"] if is_alone else modules)
            for i, (kind, modules) in enumerate(kinds.items())
        }
        formats = {group["format"] for group in groups.values()}
        quant_config = {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted({*plain, "lm_head"}),
        }
        plain_settings = self._plain.settings()
        return plain_settings | {"quantization_config": quant_config}

    @property
    def _plain(self) -> Storage:
        return Storage(self.dtype)

    def _rounded(self, entry: Entry) -> RoundedParameter | None:
        return rounded_leaf(self.leaves[entry.leaf], entry.place)

    def _scales_shape(self, entry: Entry, found: RoundedParameter) -> tuple[int, int]:
        each = 1 if found.format == "fp8" else 32 // BITS[found.format]
        require(
            entry.public_rows is None,
            f"{entry.name} holds several parameters, each rounded by itself: write a model folder "
            "instead",
        )
        require(
            len(entry.shape) == 2
            and found.offsets_NS is None
            and entry.shape[1] % found.block == 0
            and entry.shape[1] % each == 0,
            f"{entry.name} {list(entry.shape)}, {found.format} in blocks of {found.block}, has no "
            "form in a Hugging Face folder: write a model folder instead",
        )
        return entry.shape[0], entry.shape[1] // found.block


def _group(kind: Kind, targets: list[str]) -> dict[str, Any]:
    """One of config_groups."""
    format, block = kind
    weights = {
        "num_bits": BITS["fp8" if format == "fp8" else "int4" if format == "int4" else "int8"],
        "type": "float" if format == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if block else "channel",
        "group_size": block or None,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "float-quantized" if format == "fp8" else "pack-quantized",
    }
