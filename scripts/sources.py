"""The trained model that a run begins with: its variables, and where they are from."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import ModelOrigin, read_provenance, weights_fingerprint
from checkpoint.run_directory import has_checkpoint, read_run
from configs.base import RunConfig
from configs.checks import UserError, require
from data.pipeline import batches, prepare_corpus
from data.tokenizers.tokenizer import vocabulary_difference
from infer.sources import Source, open_source
from model.transformer import Transformer, Variables
from parallel.distributed import is_first
from scripts.reading import reading
from train import initial
from train.consolidation import fisher_information, with_fisher
from train.initial import rows_read
from train.loop import mesh_of
from train.progress import ProgressBar
from train.state import make_train_setup


@dataclass
class InitialWeights:
    """Weights a run begins with; both None where it draws them from its seed."""

    variables: Variables | None = None
    """None, too, where the run goes on from its own checkpoint."""
    origin: ModelOrigin | None = None

    def take(self) -> Variables | None:
        """The variables, which are not held here any longer: training has its own."""
        variables, self.variables = self.variables, None
        return variables


def initial_weights(run: RunConfig, run_dir: Path) -> InitialWeights:
    """Those of `run.init`; of a run that goes on, their origin, to be compared.

    Raises:
      UserError: as `initial_variables`; a source that numbers tokens otherwise than the run's
        corpus.
    """
    if run.init.source is None:
        return InitialWeights()
    if has_checkpoint(run_dir):
        if not run.keeps_initial:
            return InitialWeights(None, _origin_if_there(run))
        source = open_source(run.init.source)
        variables, origin = _read(source)
        return InitialWeights(initial.initial_variables(run, source.config, variables), origin)
    source = open_source(run.init.source)
    require_same_tokenizer(run, source.name, _tokenizer(source))
    variables, origin = _read(source)
    if source.kind == "run":
        origin = parent_origin(source.path, variables, run, step=origin.step)
        origin = dataclasses.replace(origin, name=source.name)
    describe_initial(origin)
    return InitialWeights(initial.initial_variables(run, source.config, variables), origin)


def initial_variables(run: RunConfig, run_dir: Path | None = None) -> Variables:
    """The variables that run.init says.

    Args:
      run_dir: of a run that began with them.
    Raises:
      UserError: init.source is not set, can't be read, is no beginning of the run's model, or holds
        other weights than those that the run in run_dir began with.
    """
    if run.init.source is None:
        raise UserError(f"{run.name} began with random weights: it has no init.source")
    source = open_source(run.init.source)
    variables, origin = _read(source)
    known = read_provenance(run_dir) if run_dir else None
    if known is not None and known.initial is not None:
        require(
            known.initial.weights == origin.weights,
            f"{run_dir} began with {known.initial}, and now init.source is {origin}: put the model "
            "back that was there",
        )
    return initial.initial_variables(run, source.config, variables)


def consolidated_state(run: RunConfig, variables: Variables) -> Any:
    """The optimiser's state that a run begins with which is held near its initial weights: with
    their Fisher information on the data of the run that they are from.

    Raises:
      UserError: init.source is no run, or its data is gone.
    """
    assert run.init.source is not None
    source = open_source(run.init.source)
    require(
        source.kind == "run",
        f"further.consolidation measures on the data that the old weights have seen, and "
        f"init.source={run.init.source!r} is no run: begin with a run",
    )
    old = read_run(source.path)
    file = prepare_corpus(old.data, old.model.vocab_size).training()
    stream = batches(file, seq_len=run.data.seq_len, batch_size=1, seed=run.seed)
    mesh = mesh_of(run)
    setup, model = make_train_setup(run, mesh), Transformer(run.model, run.execution)
    count = run.further.fisher_rows
    with jax.set_mesh(mesh), ProgressBar("Fisher information", total=count, unit="rows") as bar:

        def rows() -> Iterator[Any]:
            for i in range(count):
                bar.update(i)
                row = next(stream)
                yield {name: row[name] for name in ("tokens", "targets", "positions")}

        fisher = fisher_information(model, variables, rows(), run.seed)
        return with_fisher(setup.optimizer.init(variables["params"]), fisher)


def require_same_tokenizer(run: RunConfig, name: str, theirs: Tokenizer | None) -> None:
    """Makes the run's corpus if need be, and compares its tokenizer with a model's.

    Args:
      theirs: the model's; None is not compared.
    Raises:
      UserError: an id stands for different tokens.
    """
    if theirs is None:
        return
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    difference = vocabulary_difference(corpus.tokenizer(), theirs)
    require(
        difference is None,
        f"the tokenizers of the corpus {corpus.directory} and of {name} differ ({difference}): "
        f"begin with a model of this corpus, or make another corpus with the model's tokenizer "
        f"(--data.tokenizer {name} --data.directory NEW)",
    )


def parent_origin(
    run_dir: Path,
    variables: Variables,
    run: RunConfig,
    settings: tuple[str, ...] = (),
    step: int | None = None,
) -> ModelOrigin:
    """The run that another begins with, what is done with it, and the rows it has read.

    Args:
      variables: of a checkpoint in run_dir.
      run: the one that begins.
      step: of the checkpoint; None is the newest.
    """
    step = latest_step(run_dir / "checkpoints") or 0 if step is None else step
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    return ModelOrigin(
        name=str(run_dir),
        weights=weights_fingerprint(variables),
        step=step,
        settings=settings,
        rows_read=rows_read(run_dir, step, run, corpus),
    )


def describe_initial(origin: ModelOrigin) -> None:
    """Says, on the first process, what a new run begins with and which rows it reads."""
    if not is_first():
        return
    rows = f", reading on after its {origin.rows_read:,} rows" if origin.rows_read else ""
    print(f"beginning with the weights of {origin.name}{rows}", flush=True)


def _origin_if_there(run: RunConfig) -> ModelOrigin | None:
    assert run.init.source is not None
    try:
        return _read(open_source(run.init.source))[1]
    except UserError as error:
        print(f"note: the model that this run began with can't be compared: {error}", flush=True)
        return None


def _tokenizer(source: Source) -> Tokenizer | None:
    try:
        return source.tokenizer().tokenizer
    except UserError as error:
        print(f"note: the tokenizer of {source.name} can't be compared: {error}", flush=True)
        return None


def _read(source: Source) -> tuple[Variables, ModelOrigin]:
    step = latest_step(source.path / source.checkpoints) if source.kind == "run" else None
    with reading(source) as progress:
        _, variables = source.load(progress=progress)
    weights = weights_fingerprint(variables)
    return variables, ModelOrigin(name=source.name, weights=weights, step=step)
