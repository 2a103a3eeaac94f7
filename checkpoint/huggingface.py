"""Checkpoints in Hugging Face form: config.json and safetensors, read and written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from checkpoint import assemble
from checkpoint.families.base import Family
from checkpoint.logical_tensors import LogicalTensors
from checkpoint.public import PublicCheckpoint, find_family, read_model, write_model
from checkpoint.settings import Settings
from checkpoint.tables import expand, flatten
from checkpoint.tensor_files import TensorWriter, open_tensors
from configs.architecture import ModelConfig

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
    values = write_model(family, config) | {"dtype": dtype, "torch_dtype": dtype} | extra
    entries = expand(family.rows, config, flatten(variables))
    copied = assemble.written_copies(family.copies, config)
    made = {entry.name: (entry, DTYPES[dtype]) for entry in entries}
    plan = [(e.name, _dtype(e.name, DTYPES[dtype]), e.shape) for e in entries]
    writer = TensorWriter(folder, plan, max_shard_bytes=max_shard_bytes)
    del made, copied
    for name, tensor in assemble.saved(entries, variables):
        writer.write(name, tensor)
        progress(tensor.size)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
