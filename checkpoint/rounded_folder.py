"""Variables with rounded weights, as a model folder holds them: arrays in numpy's files.

rounded/NAME.npy      an array: values of float32 or (as uint16) bfloat16, codes, scales, offsets
rounded.json          which file is what

A file's data begins at a multiple of 64 bytes and may be mapped into memory (numpy.load's
mmap_mode). Codes lie as [..., N, K], of int4 two to a byte, the first in the low half.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoint.rounded import (
    SCALE_DTYPES,
    RoundedParameter,
    StackedParameters,
    as_rows,
    from_rows,
    stacked,
)
from checkpoint.weight_map import flatten, leaf_name
from configs.checks import UserError
from formats.safetensors.header import explain_os_errors
from kernels.quantize import MatrixDims

INDEX, ARRAYS = "rounded.json", "rounded"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def has_rounded(variables: Any) -> bool:
    """Whether any variable is in codes."""
    kinds = RoundedParameter | StackedParameters
    return any(isinstance(x, kinds) for x in flatten(variables).values())


def is_rounded_folder(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def write_rounded(folder: Path, variables: Any) -> None:
    """Writes the arrays and then the index.

    Raises:
      UserError: the disk refuses.
    """
    with explain_os_errors(folder, "be written"):
        (folder / ARRAYS).mkdir(parents=True, exist_ok=True)
        index: dict[str, list[dict[str, Any]]] = {}
        for name, leaf in flatten(variables).items():
            is_stack = isinstance(leaf, StackedParameters)
            parts = leaf.parts if isinstance(leaf, StackedParameters) else (leaf,)
            index[name] = [
                {"is_stacked": is_stack} | _write(folder / ARRAYS, f"{name}.{i}", part)
                for i, part in enumerate(parts)
            ]
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def is_halved(name: str, num_dims: int) -> bool:
    """Whether an array that is not rounded is held in bfloat16: matrices are, but for routers.

    Args:
      name: its path in the variables; those of periods have a stack's dim more.
    """
    own_dims = num_dims - name.startswith("params.periods.")
    return own_dims > 1 and "router" not in name


def _write(folder: Path, name: str, part: Any) -> dict[str, Any]:
    """Writes one array or its codes and scales; what the index says of it."""
    if not isinstance(part, RoundedParameter):
        values = np.asarray(part, np.float32)
        if is_halved(name, values.ndim):
            np.save(folder / f"{name}.npy", values.astype(BFLOAT16).view(np.uint16))
            return {"kind": "bfloat16"}
        np.save(folder / f"{name}.npy", values)
        return {"kind": "float32"}
    codes = np.ascontiguousarray(as_rows(part.codes, part.dims)).view(np.uint8)
    if part.format == "int4":
        low, high = codes[..., ::2] & 15, codes[..., 1::2] & 15
        codes = low | high << 4
    np.save(folder / f"{name}.npy", codes)
    steps = {"scales": part.scales_NS, "offsets": part.offsets_NS}
    dtype = SCALE_DTYPES[part.scale_dtype]
    for what, values in steps.items():
        if values is not None:
            stored = values.astype(dtype)
            np.save(folder / f"{name}.{what}.npy", stored.view(np.dtype(f"u{dtype.itemsize}")))
    return {
        "kind": part.format,
        "shape": list(part.shape),
        "dims": list(part.dims),
        "scale_dtype": part.scale_dtype,
        "has_offsets": part.offsets_NS is not None,
    }


def read_rounded(folder: Path, abstract_variables: Any) -> Any:
    """The variables in floats, laid out and typed as the abstract ones.

    Raises:
      UserError: files are damaged, missing, or of another model.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        held = {
            name: [_read(folder, name, i, x) for i, x in enumerate(parts)]
            for name, parts in index.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is a damaged folder of rounded weights ({error}): quantise the model again"
        ) from error

    def place(path: Any, leaf: Any) -> jax.Array:
        name = leaf_name(path)
        parts = held.get(name)
        stack = index[name][0]["is_stacked"] if parts else False
        value = None if not parts else in_floats(stacked(parts) if stack else parts[0])
        if value is None or value.shape != leaf.shape:
            raise UserError(
                f"{folder}: {name} is {'missing' if value is None else list(value.shape)}, and the "
                f"model of model.json needs {list(leaf.shape)}: quantise the model again"
            )
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(place, abstract_variables)


def in_floats(leaf: Any) -> np.ndarray:
    """A variable's values, float32."""
    if isinstance(leaf, RoundedParameter | StackedParameters):
        return leaf.part((None,) * len(leaf.shape))
    return np.asarray(leaf)


def _read(folder: Path, name: str, i: int, what: Mapping[str, Any]) -> Any:
    path = folder / ARRAYS / f"{name}.{i}.npy"
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if what["kind"] == "float32":
        return np.array(stored)
    if what["kind"] == "bfloat16":
        return np.array(stored).view(BFLOAT16).astype(np.float32)
    dims = MatrixDims(*what["dims"])
    codes = np.array(stored)
    if what["kind"] == "int4":
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        signed = halves.astype(np.int8)
        codes = signed if what["has_offsets"] else np.where(signed > 7, signed - 16, signed)
    else:
        codes = codes.view(np.int8 if what["kind"] == "int8" else FP8)
    dtype = SCALE_DTYPES[what["scale_dtype"]]

    def steps(kind: str) -> np.ndarray:
        return np.load(folder / ARRAYS / f"{name}.{i}.{kind}.npy").view(dtype).astype(np.float32)

    return RoundedParameter(
        what["kind"],
        np.ascontiguousarray(from_rows(codes.astype(codes.dtype), tuple(what["shape"]), dims)),
        steps("scales"),
        steps("offsets") if what["has_offsets"] else None,
        dims,
        what["scale_dtype"],
    )
