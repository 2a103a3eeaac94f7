"""Checkpoints in Hugging Face form: config.json and safetensors, read and written."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from checkpoint import assemble
from checkpoint.compressed_tensors import CompressedStorage
from checkpoint.config_reader import Settings
from checkpoint.export_dtype import ExportDtype, choose_storage
from checkpoint.families.base import Family
from checkpoint.families.weight_maps import FUSED_EXPERTS, with_fused_experts
from checkpoint.logical_tensors import LogicalTensors
from checkpoint.public import PublicCheckpoint, find_family, read_model, write_model
from checkpoint.renamed_tensors import RenamedTensors
from checkpoint.rounded_folder import has_rounded
from checkpoint.weight_map import Row, by_tensor, expand, flatten, whole_tensor
from configs.architecture import ModelConfig
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter
from formats.small_files import read_json_object


def open_checkpoint(folder: Path) -> PublicCheckpoint:
    """Reads config and headers; no tensor.

    Raises:
      UserError: no such folder, a family that is not built, or damaged files.
    """
    settings = Settings.read(folder / "config.json")
    family = find_family(settings)
    settings = settings.with_defaults(family.defaults)
    tensors = LogicalTensors(open_tensors(folder), _quantization(folder, settings))
    if family.renames:
        tensors = RenamedTensors(tensors, family.renames)
    config = read_model(family, settings, tensors)
    return PublicCheckpoint(folder, family, settings, config, _rows(family, tensors), tensors)


def _quantization(folder: Path, settings: Settings) -> Mapping[str, Any] | None:
    """quantization_config; of modelopt's older files hf_quant_config.json says that there is one.

    Raises:
      UserError: not an object.
    """
    part, beside = settings.part("quantization_config"), folder / "hf_quant_config.json"
    if part is None and beside.exists():
        return {"quant_method": "modelopt", **read_json_object(beside)}
    return None if part is None else part.values


def _rows(family: Family, tensors: assemble.Tensors) -> Sequence[Row]:
    """The family's table for the names that the files have: experts one by one, or fused."""
    fused = re.escape(FUSED_EXPERTS).replace(r"\*", r"\d+")
    if family.fuses_experts and any(re.fullmatch(fused, name) for name in tensors.shapes):
        return with_fused_experts(family.rows)
    return family.rows


def export(
    folder: Path,
    family: Family,
    config: ModelConfig,
    variables: Any,
    *,
    dtype: ExportDtype,
    extra: Mapping[str, Any],
    generation: Mapping[str, Any] = MappingProxyType({}),
    like: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: assemble.Progress = lambda _: None,
) -> None:
    """Writes config.json, generation_config.json and the tensors, one at a time, into a folder
    that may hold some of them already: whole shards are kept.

    Args:
      variables: arrays of one device, `assemble.LazyParameter`, or rounded ones, which are written
        in their codes (checkpoint/compressed_tensors.py); router state stays float32.
      extra: token ids for config.json: bos_token_id, eos_token_id.
      generation: further settings for generation_config.json.
      like: the source's quantization_config: see `choose_storage`.
      max_shard_bytes: of one file.
      progress: is told elements.
    Raises:
      UserError: the family can't say what the model does, or is not released in this dtype, or a
        value does not fit it.
    """
    leaves = flatten(variables)
    entries = expand(family.rows, config, leaves)
    entries += assemble.written_copies(entries, family.copies, config)
    storage = choose_storage(family, dtype, like)
    if has_rounded(variables):
        storage = CompressedStorage(storage.dtype, leaves, entries)
    values = {**write_model(family, config), **storage.settings(), **extra}
    sharing = by_tensor(entries)
    plans = {name: storage.plan(whole_tensor(parts)) for name, parts in sharing.items()}
    plan = [planned for parts in plans.values() for planned in parts]
    with TensorWriter(folder, plan, max_shard_bytes=max_shard_bytes) as writer:

        def is_done(name: str) -> bool:
            return all(writer.done(part) for part, _, _ in plans[name])

        for entry, tensor in assemble.saved(entries, variables, is_done):
            if tensor is not None:
                parts = storage.encode(entry, tensor)
                for (name, _, _), part in zip(plans[entry.name], parts, strict=True):
                    writer.write(name, part)
            progress(math.prod(entry.shape))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    tokens = {name: extra[name] for name in ("bos_token_id", "eos_token_id") if name in extra}
    settings = {**(generation or {"_from_model_config": True}), **tokens}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
