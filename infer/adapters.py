"""Adapters in PEFT's form (checkpoint/peft.py) on any source, and those of a run written so."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.families.base import Family
from checkpoint.orbax_store import restore_variables
from checkpoint.peft import MatrixForm, read_peft, require_adapter, write_peft
from checkpoint.public import export_family
from checkpoint.run_directory import CHECKPOINTS, read_run
from checkpoint.weight_map import Entry, Row, expand, flatten
from configs.architecture import ModelConfig
from configs.checks import UserError
from formats.atomic_folder import partial_folder
from infer.kept_weights import files_below, opened_files, together
from infer.sources import Source, merged, open_source, whole_on_devices
from model.adapters import abstract_adapters, adapted_matrices
from model.transformer import Transformer, Variables, abstract_variables


def with_adapter(source: Source, folder: Path) -> Source:
    """The source with the adapter of a folder of PEFT's added to its weights.

    Raises:
      UserError: no adapter that is read here, or one of another model.
    """
    require_adapter(folder)
    opened = opened_files(lambda: files_below(folder))
    adapters = read_adapter(folder, source)

    def restore(abstract: Any) -> Variables:
        placed = jax.device_put(adapters, whole_on_devices(abstract))
        return merged(Transformer(source.config), source.restore(abstract), placed)

    return dataclasses.replace(
        source,
        name=f"{source.name} with {folder}",
        kind="adapted",
        public=None,
        _restore=restore,
        fingerprint=lambda: together(source.fingerprint(), opened()),
    )


def read_adapter(folder: Path, source: Source) -> Any:
    """The collection "adapters" of the source's model, scaled."""
    entries, forms = model_entries(source.config, _rows(source)), model_forms(source.config)
    tree: dict[str, Any] = {}
    for path, (a, b) in read_peft(folder, entries, forms).items():
        node = tree
        for key in path.split("."):
            node = node.setdefault(key, {})
        node |= {"a": a, "b": b}
    return tree


def export_adapter(run_dir: Path, target: Path) -> Family:
    """Writes the newest adapters of a run in PEFT's form; returns the family whose names they have.

    Raises:
      UserError: a run without adapters, a model that no public family holds, or a folder that is
        there.
    """
    run = read_run(run_dir)
    if run.lora is None:
        raise UserError(
            f"{run_dir} was trained without adapters (lora): its weights are written whole, by "
            "--to huggingface"
        )
    assert run.init.source is not None, "adapters need one"
    base, model = open_source(run.init.source), Transformer(run.model)
    family = export_family(run.model) if base.public is None else base.public.family
    abstract, _ = abstract_adapters(model, run.lora)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    name = "adapters" if run.optimizer.average is None else "averaged"
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    loaded, step = restore_variables(run_dir / CHECKPOINTS, {name: wanted})
    leaves = {path: np.asarray(x) for path, x in flatten(loaded[name]).items()}
    paths = {path.rpartition(".")[0] for path in leaves}
    with partial_folder(target, f"{run_dir.resolve()} {step}") as folder:
        write_peft(
            folder,
            model_entries(run.model, family.rows),
            model_forms(run.model),
            {path: (leaves[f"{path}.a"], leaves[f"{path}.b"]) for path in paths},
            rank=run.lora.rank,
            alpha=run.lora.alpha,
            base=run.init.source,
        )
    return family


def _rows(source: Source) -> tuple[Row, ...]:
    family = export_family(source.config) if source.public is None else source.public.family
    return tuple(family.rows)


def model_entries(config: ModelConfig, rows: tuple[Row, ...]) -> list[Entry]:
    return expand(rows, config, flatten(abstract_variables(Transformer(config))[0]))


def model_forms(config: ModelConfig) -> dict[str, MatrixForm]:
    matrices = adapted_matrices(Transformer(config))
    return {
        ".".join(path): MatrixForm(x.shape, x.stack, x.inputs, x.parts)
        for path, x in matrices.items()
    }
