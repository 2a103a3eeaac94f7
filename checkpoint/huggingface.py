"""Checkpoints in Hugging Face form: config.json and safetensors, read and written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from checkpoint import assemble
from checkpoint.families.base import Family
from checkpoint.logical_tensors import LogicalTensors
from checkpoint.public import PublicCheckpoint, find_family, read_model, write_model
from checkpoint.settings import Settings
from checkpoint.tables import Entry, expand, flatten
from checkpoint.tensor_files import open_tensors
from checkpoint.tensor_writer import TensorWriter
from configs.architecture import ModelConfig
from configs.checks import UserError

ExportDtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def open_checkpoint(folder: Path) -> PublicCheckpoint:
    """Reads config and headers; no tensor.

    Raises:
      UserError: no such folder, a family that is not built, or damaged files.
    """
    settings = Settings.read(folder / "config.json")
    family = find_family(settings)
    quantization = settings.part("quantization_config")
    tensors = LogicalTensors(open_tensors(folder), quantization and quantization.values)
    config = read_model(family, settings, tensors)
    return PublicCheckpoint(folder, family, settings, config, family.rows, tensors)


def export(
    folder: Path,
    family: Family,
    config: ModelConfig,
    variables: Any,
    *,
    dtype: ExportDtype,
    extra: Mapping[str, Any],
    max_shard_bytes: int = 5_000_000_000,
    progress: assemble.Progress = lambda _: None,
) -> None:
    """Writes config.json, generation_config.json and the tensors, one at a time, into a folder
    that may hold some of them already: whole shards are kept.

    Args:
      variables: arrays of one device; state, norms and router biases stay float32.
      extra: token ids for config.json: bos_token_id, eos_token_id.
      max_shard_bytes: of one file.
      progress: is told elements.
    Raises:
      UserError: the family can't say what the model does, or a value does not fit the dtype.
    """
    kinds = {"dtype": dtype, "torch_dtype": dtype}
    values = {**write_model(family, config), **kinds, **extra}
    entries = expand(family.rows, config, flatten(variables))
    entries += assemble.written_copies(entries, family.copies, config)
    plan = [(entry.name, _stored(entry, dtype), entry.shape) for entry in entries]
    with TensorWriter(folder, plan, max_shard_bytes=max_shard_bytes) as writer:
        for entry, tensor in assemble.saved(entries, variables, is_done=writer.done):
            if tensor is not None:
                writer.write(entry.name, _as(tensor, _stored(entry, dtype), entry.name))
            progress(math.prod(entry.shape))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    tokens = {name: extra[name] for name in ("bos_token_id", "eos_token_id") if name in extra}
    generation = {"_from_model_config": True, **tokens}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _stored(entry: Entry, dtype: ExportDtype) -> np.dtype:
    """State that steers the choice of experts stays float32, as DeepSeek ships it."""
    return DTYPES["float32" if entry.leaf.startswith("router_state.") else dtype]


def _as(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(
            f"{name} has values up to {np.abs(tensor).max():.3g}, which {dtype} can't hold: export "
            "in bfloat16 or float32"
        )
    return cast
