"""The training loop: data, step, log, alarms, checkpoints; made to be interrupted and started
again.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from checkpoint.orbax_store import CheckpointStore, abstract_like, latest_step
from checkpoint.provenance import (
    ModelOrigin,
    Objective,
    Provenance,
    checkpoint_metadata,
    read_provenance,
)
from checkpoint.run_directory import open_run_dir, read_run, sole_writer
from configs.base import RunConfig
from configs.checks import require
from configs.serialization import differences
from data.inventory import inventory
from data.mixture_rows import MixtureRows
from data.pipeline import Batch, Corpus, batches, open_corpus, prepare_corpus
from model.transformer import Variables
from parallel.distributed import (
    batch_block,
    connect,
    first_then_others,
    is_first,
    is_started,
    largest,
)
from parallel.mesh import make_mesh
from parallel.sharding import partition_spec
from train.best import BestCheckpoint
from train.compiled import compile_ahead
from train.loggers import logger_hooks
from train.losses import ChunkLoss, cross_entropy
from train.matching import Matching
from train.pending import PendingMetrics
from train.profile import Profile
from train.recorder import Hook, Recorder
from train.state import TrainState, init_state, make_train_setup, restored_state
from train.step import TrainStep, make_train_step
from train.validation import Validation

Sample = Callable[[int, Variables], None]
"""Writes texts of the model, whose variables are not to be kept: (steps done, variables)."""

BatchTransform = Callable[[dict[str, Any], TrainState, int], dict[str, Any]]
"""Adds what the objective needs (the teacher's view) to a batch on the devices, given the state
before the step and the steps behind it."""


@dataclass(frozen=True)
class FitResult:
    steps: int
    """Steps done in all."""
    interrupted: int | None
    """The signal that stopped the run, or None when it is complete."""
    train_seconds: float
    new_steps: int = 0
    """Steps that this call did."""


def fit(
    run: RunConfig,
    run_dir: Path,
    *,
    chunk_loss: ChunkLoss = cross_entropy,
    make_transform: Callable[[Mesh], BatchTransform] | None = None,
    matching: Matching | None = None,
    objective: Objective = "next_token",
    variables: Variables | None = None,
    opt_state: Any = None,
    initial: ModelOrigin | None = None,
    hooks: Sequence[Hook] = (),
    experiment: str | None = None,
    sample: Sample | None = None,
    profile: Profile | None = None,
) -> FitResult:
    """Trains until run.steps are done or a signal asks to stop; started again, it goes on.

    run_dir receives config.json, provenance.json, metrics.jsonl, checkpoints/ and what the run
    keeps of its corpus. SIGINT and SIGTERM end the step at hand, save, and return; after a kill the
    run goes on from its last checkpoint. On the same mesh the resumed losses equal the unbroken
    run's bit for bit.

    Args:
      make_transform: called with the mesh in use; see BatchTransform.
      matching: of an objective that compares layers with those that the transform gives.
      objective: what chunk_loss is; a run goes on with the one it began with.
      variables: what a new run begins with, if not with weights drawn from its seed: those of
        run.init (train/initial.py). A run that keeps_initial needs them when it goes on, too.
      opt_state: the optimiser's state it begins with beside these variables; None is a fresh one.
      initial: where these variables are from; None is not compared when a run goes on.
      hooks: called with each step and its line of the log when its metrics have been fetched.
      experiment: text of the user's own file that the run comes from, kept as experiment.py.
      sample: called every run.samples.every steps with them and the variables.
      profile: steps to trace; None: none.
    Raises:
      UserError: a run_dir with another experiment or another process in it, a corpus or checkpoint
      that can't be read, no disk.
      TrainingAlarm: the run stopped itself; checkpoints are those from before the fault.
    """
    _refuse_fewer_steps(run, run_dir)
    require(
        run.objective is None or chunk_loss is not cross_entropy,
        f"objective={run.objective!r} is in a file of its own, which scripts.train alone executes: "
        "train the run there",
    )
    require(
        run.samples.every is None or sample is not None,
        f"samples.every={run.samples.every} needs what writes them (scripts/samples.py): leave it "
        "out, or train by scripts.train",
    )
    mesh = mesh_of(run)
    connect(mesh)
    setup = make_train_setup(run, mesh, matching)
    corpus = _open_corpus(run)
    with _first_writes(run_dir), jax.set_mesh(mesh), _stop_signals() as stop:
        known = _open_folder(run, run_dir, corpus, objective, initial, experiment)
        transform = make_transform(mesh) if make_transform else _unchanged
        known = read_provenance(run_dir) or known  # with the teacher that make_transform has noted
        metadata = checkpoint_metadata(run, known, corpus.tokenizer_path)
        keep = run.checkpoint.keep
        with CheckpointStore(run_dir / "checkpoints", keep=keep, metadata=metadata) as store:
            began = time.monotonic()
            iterator = _batches(run, corpus, mesh, known.initial.rows_read if known.initial else 0)
            step = make_train_step(run, setup, chunk_loss, matching)
            sources = MixtureRows(run.data, corpus.training())

            def compile_step() -> None:
                if make_transform is None and (store.latest_step or 0) < run.steps:
                    batch = to_devices(_first_batch(iterator, sources), mesh)
                    compile_ahead(step, abstract_like(setup.abstract_state, setup.shardings), batch)

            state, first = _start(
                run, setup, store, iterator, variables, opt_state, before=compile_step
            )
            del variables, opt_state  # the state has its own; these may be as large
            validation = Validation(run, corpus, mesh)
            with (
                _loggers(run, run_dir) as loggers,
                Recorder(run, run_dir, store, mesh, [*hooks, *loggers]) as recorder,
                BestCheckpoint(run_dir, metadata, is_kept=run.checkpoint.best) as best,
            ):
                loop = _Loop(
                    run=run,
                    run_dir=run_dir,
                    mesh=mesh,
                    batches=iterator,
                    sources=sources,
                    transform=transform,
                    step=step,
                    validation=validation,
                    store=store,
                    best=best,
                    recorder=recorder,
                    stop=stop,
                    sample=sample,
                    profile=profile or Profile(),
                )
                state, done = loop.train(state, first)
            if done > first and done % run.checkpoint.every:  # else it is saved
                store.save(done, state.to_dict(), iterator)
            store.wait()
            return FitResult(done, stop.agreed, time.monotonic() - began, done - first)


@dataclass(frozen=True)
class _Loop:
    """The steps of a run, one after the other, and all that they need."""

    run: RunConfig
    run_dir: Path
    mesh: Mesh
    batches: Any
    sources: MixtureRows
    transform: BatchTransform
    step: TrainStep
    validation: Validation
    store: CheckpointStore
    best: BestCheckpoint
    recorder: Recorder
    stop: "_Stop"
    sample: Sample | None
    profile: Profile

    def train(self, state: TrainState, done: int) -> tuple[TrainState, int]:
        """The state after the last step, and the steps done; its metrics are all in the record.

        Args:
          state: used up.
        """
        every = self.run.metrics.fetch_every
        pending = PendingMetrics(every, self.mesh.devices.flat[0].platform)
        while done < self.run.steps and not self.stop.is_asked():
            self.profile.before(done + 1, self.run_dir)
            asked = time.monotonic()
            rows = self._next_batch()
            waited = time.monotonic() - asked
            batch = self.transform(to_devices(rows, self.mesh), state, done)
            state, metrics = self.step(state, batch)
            done += 1
            pending.add(done, metrics, waited)
            self.profile.after(done, state, self.run_dir)
            if self.validation.is_due(done):
                pending.settle()
                measured = self.validation.measure(state)
                pending.extend_last(measured)
                self.best.offer(done, measured["validation_loss"], state, self.batches)
            if self.sample is not None and done % (self.run.samples.every or done + 1) == 0:
                pending.settle()
                self.sample(done, state.measured_variables)
            if done % self.run.checkpoint.every == 0:
                self.recorder.record(pending.fetch(whole=True))  # an alarm comes before the save
                self.store.save(done, state.to_dict(), self.batches)
            elif pending.is_due():
                self.recorder.record(pending.fetch())
            pending.restart_clock()
        self.profile.close()
        self.recorder.record(pending.fetch(whole=True))
        return state, done

    def _next_batch(self) -> Batch:
        """The next batch; of a mixture with the source of each row."""
        return _with_sources(next(self.batches), self.sources)


def _with_sources(batch: Batch, sources: MixtureRows) -> Batch:
    return batch | {"source": sources.of(batch["row"])} if sources else batch


def _first_batch(batches: Any, sources: MixtureRows) -> Batch:
    """A batch such as the run's; the iterator is left where it was."""
    position = batches.get_state()
    batch = next(batches)
    batches.set_state(position)
    return _with_sources(batch, sources)


@contextlib.contextmanager
def _loggers(run: RunConfig, run_dir: Path) -> Iterator[list[Hook]]:
    """The hooks of the run's loggers, on the first process."""
    if not is_first():
        yield []
        return
    with logger_hooks(run, run_dir) as hooks:
        yield hooks


def _refuse_fewer_steps(run: RunConfig, run_dir: Path) -> None:
    """
    Raises:
      UserError: the run has more steps behind it than it asks for.
    """
    behind = latest_step(run_dir / "checkpoints") or 0
    require(
        behind <= run.steps,
        f"the run in {run_dir} has {behind} steps behind it, steps={run.steps} asks for fewer: "
        "give more, or another --run-dir",
    )


def _open_corpus(run: RunConfig) -> Corpus:
    """The run's corpus, made if need be; says what is in it."""

    def make() -> Corpus:
        corpus = prepare_corpus(run.data, run.model.vocab_size)
        for sentence in inventory(corpus, run):
            print(sentence, flush=True)
        return corpus

    def look() -> Corpus:
        _require_seen(Path(run.data.directory))
        return open_corpus(run.data, run.model.vocab_size)

    return first_then_others(make, look)


def _open_folder(
    run: RunConfig,
    run_dir: Path,
    corpus: Corpus,
    objective: Objective,
    initial: ModelOrigin | None,
    experiment: str | None,
) -> Provenance:
    """What the run was made from, by its folder, which is made or compared with the run."""

    def make() -> Provenance:
        stated = Provenance(objective=objective, corpus=corpus.fingerprints(), initial=initial)
        return open_run_dir(run, run_dir, stated, corpus, experiment)

    def look() -> Provenance:
        _require_seen(run_dir / "config.json")
        changed = differences(read_run(run_dir), run)
        require(
            not changed,
            f"process {jax.process_index()} was started with other settings than the first "
            f"({'; '.join(changed)}): start all processes with the same command",
        )
        known = read_provenance(run_dir)
        assert known is not None, "the first process has written it"
        return known

    return first_then_others(make, look)


def _require_seen(path: Path) -> None:
    """
    Raises:
      UserError: what the first process has written is not there.
    """
    require(
        path.exists(),
        f"process {jax.process_index()} does not see {path}, which the first one has written: the "
        "processes of a run need one file system for its folder and its corpus",
    )


def _unchanged(batch: dict[str, Any], state: TrainState, done: int) -> dict[str, Any]:
    return batch


def mesh_of(run: RunConfig) -> Mesh:
    """
    Raises:
      UserError: there are not enough devices.
    """
    return make_mesh(run.mesh.data, run.mesh.expert, run.mesh.tensor)


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """A global batch, split along its rows, from this process's block of them: a tree of arrays."""

    def put(x: np.ndarray) -> jax.Array:
        spec = partition_spec(("batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(put, batch)


def _first_writes(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the folder for all processes of the run, of which the first does."""
    return sole_writer(run_dir) if is_first() else contextlib.nullcontext()


def _batches(run: RunConfig, corpus: Corpus, mesh: Mesh, rows_before: int) -> Any:
    """This process's rows of every batch."""
    block, num_blocks = batch_block(mesh, run.batch_size)
    return batches(
        corpus.training(),
        seq_len=run.data.seq_len,
        batch_size=run.batch_size,
        seed=run.seed,
        order=run.data.order,
        phases=run.data.phases,
        rows_before=rows_before,
        process_index=block,
        process_count=num_blocks,
    )


def _start(
    run: RunConfig,
    setup: Any,
    store: CheckpointStore,
    iterator: Any,
    variables: Variables | None,
    opt_state: Any,
    before: Callable[[], None],
) -> tuple[TrainState, int]:
    """The state to begin with and the steps it has behind it.

    Args:
      before: called once nothing is found to be wrong, before the state takes memory.
    """
    if store.latest_step is None:
        require(
            run.init.source is None or variables is not None,
            f"init.source={run.init.source!r} is read by scripts.train and scripts.upcycle: this "
            "verb begins another way, leave it out",
        )
        require(
            not run.further.consolidation or opt_state is not None,
            f"further.consolidation={run.further.consolidation} keeps a run near the model that it "
            "begins with: name a run as init.source, and train it by scripts.train",
        )
        before()
        return init_state(setup, run.seed, variables, opt_state), 0
    require(
        not run.keeps_initial or variables is not None,
        f"{run.name} goes on from init.source={run.init.source!r}, whose weights are needed: train "
        "it by scripts.train",
    )
    before()
    wanted = abstract_like(setup.abstract_state.to_dict(), setup.shardings.to_dict())
    state = restored_state(setup, store.restore(wanted, iterator), variables)
    return state, int(state.step)


@dataclass
class _Stop:
    received: int | None = None
    """The signal that this process got."""
    agreed: int | None = None
    """The signal of any process, once all know of it and stop."""
    asked: jax.Array | None = None
    """The largest signal of all processes when they last began a step; on the devices."""

    def is_asked(self) -> bool:
        """Whether to stop before the next step; all processes ask before each, and stop together.

        Of several, at the step after the one in which the signal came: the answer of the step
        before is read, so that no accelerator waits for it.
        """
        if not is_started():
            self.agreed = self.received
            return self.agreed is not None
        before, self.asked = self.asked, largest(self.received or 0)
        if jax.local_devices()[0].platform == "cpu":
            self.asked.block_until_ready()  # see PendingMetrics
        if before is not None and int(before):
            self.agreed = int(before)
        return self.agreed is not None


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes SIGINT or SIGTERM instead of dying of it; a second SIGINT interrupts at once."""
    stop = _Stop()

    def note(number: int, _: object) -> None:
        if stop.received is not None:
            raise KeyboardInterrupt
        stop.received = number
        print("\nstopping after this step ...", flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
