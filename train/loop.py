"""The training loop: data, step, log, alarms, checkpoints; made to be interrupted and started
again.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
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
from checkpoint.run_directory import open_run_dir, sole_writer
from configs.base import RunConfig
from configs.checks import require
from data.inventory import inventory
from data.pipeline import Batch, Corpus, batches, prepare_corpus
from model.transformer import Variables
from parallel.mesh import make_mesh
from parallel.sharding import partition_spec
from train.losses import ChunkLoss, cross_entropy
from train.metrics import Alarms, MetricsLog, TrainingAlarm, logged_num_experts, make_line
from train.progress import ProgressBar
from train.state import TrainState, init_state, make_train_setup
from train.step import make_train_step

BatchTransform = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
"""Adds what the objective needs (the teacher's view) to a batch on the devices."""


OnStep = Callable[[int, Variables], None]
"""Called after each step with the steps done and the variables, the mesh in use."""


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
    objective: Objective = "next_token",
    variables: Variables | None = None,
    opt_state: Any = None,
    initial: ModelOrigin | None = None,
    on_step: OnStep = lambda step, variables: None,
) -> FitResult:
    """Trains until run.steps are done or a signal asks to stop; started again, it goes on.

    run_dir receives config.json, provenance.json, metrics.jsonl, checkpoints/ and what the run
    keeps of its corpus. SIGINT and SIGTERM end the step at hand, save, and return; after a kill the
    run goes on from its last checkpoint. On the same mesh the resumed losses equal the unbroken
    run's bit for bit.

    Args:
      make_transform: called with the mesh in use; see BatchTransform.
      objective: what chunk_loss is; a run goes on with the one it began with.
      variables: what a new run begins with, if not with weights drawn from its seed: those of
        run.init (train/initial.py).
      opt_state: the optimiser's state it begins with beside these variables; None is a fresh one.
      initial: where these variables are from; None is not compared when a run goes on.
      on_step: for what else is to be measured; it changes nothing.
    Raises:
      UserError: a run_dir with another experiment or another process in it, a corpus or checkpoint
      that can't be read, no disk.
      TrainingAlarm: the run stopped itself; checkpoints are those from before the fault.
    """
    behind = latest_step(run_dir / "checkpoints") or 0
    require(
        behind <= run.steps,
        f"the run in {run_dir} has {behind} steps behind it, steps={run.steps} asks for fewer: "
        "give more, or another --run-dir",
    )
    mesh = mesh_of(run)
    setup = make_train_setup(run, mesh)
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    for sentence in inventory(corpus, run):
        print(sentence, flush=True)
    stated = Provenance(objective=objective, corpus=corpus.fingerprints(), initial=initial)
    with _first_writes(run_dir), jax.set_mesh(mesh), _stop_signals() as stop:
        known = open_run_dir(run, run_dir, stated, corpus)
        transform = make_transform(mesh) if make_transform else None
        known = read_provenance(run_dir) or known  # with the teacher that make_transform has noted
        metadata = checkpoint_metadata(run, known, corpus.tokenizer_path)
        keep = run.checkpoint.keep
        with CheckpointStore(run_dir / "checkpoints", keep=keep, metadata=metadata) as store:
            began = time.monotonic()
            iterator = _batches(run, corpus, known.initial.rows_read if known.initial else 0)
            state, done = _start(run, setup, store, iterator, variables, opt_state)
            behind = done
            del variables, opt_state  # the state has its own; these may be as large
            step = make_train_step(run, setup, chunk_loss)
            log = MetricsLog(run_dir / "metrics.jsonl", resume_step=done)
            alarms = Alarms(run.alarms, logged_num_experts(run.model))
            with contextlib.closing(log), ProgressBar(run.name, total=run.steps, done=done) as bar:
                while done < run.steps and stop.signal is None:
                    state, metrics, seconds = _one_step(
                        step, state, next(iterator), mesh, transform
                    )
                    done += 1
                    tokens = run.tokens_per_step
                    line = make_line(done, metrics, seconds, run.steps, tokens, run.model)
                    log.append(line)
                    _check(alarms, line, store)
                    if done % run.checkpoint.every == 0:
                        store.save(done, state.to_dict(), iterator)
                    on_step(done, state.variables)
                    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                    bar.update(done, f"loss {line['loss']:.3f}  {speed}")
            if done > (store.latest_step or 0):
                store.save(done, state.to_dict(), iterator)
            store.wait()
            return FitResult(done, stop.signal, time.monotonic() - began, done - behind)


def mesh_of(run: RunConfig) -> Mesh:
    """
    Raises:
      UserError: there are not enough devices.
    """
    return make_mesh(run.mesh.data, run.mesh.expert, run.mesh.tensor)


def to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a global batch on its devices, split along the batch."""

    def put(x: np.ndarray) -> jax.Array:
        spec = partition_spec(("batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return {name: put(x) for name, x in batch.items()}


def _first_writes(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the folder for all processes of the run, of which the first does."""
    return sole_writer(run_dir) if jax.process_index() == 0 else contextlib.nullcontext()


def _batches(run: RunConfig, corpus: Corpus, rows_before: int) -> Any:
    return batches(
        corpus.training(),
        seq_len=run.data.seq_len,
        batch_size=run.batch_size,
        seed=run.seed,
        order=run.data.order,
        rows_before=rows_before,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _start(
    run: RunConfig,
    setup: Any,
    store: CheckpointStore,
    iterator: Any,
    variables: Variables | None,
    opt_state: Any,
) -> tuple[TrainState, int]:
    """The state to begin with and the steps it has behind it."""
    if store.latest_step is None:
        require(
            run.init.source is None or variables is not None,
            f"init.source={run.init.source!r} is read by scripts.train and scripts.upcycle: this "
            "verb begins another way, leave it out",
        )
        return init_state(setup, run.seed, variables, opt_state), 0
    wanted = abstract_like(setup.abstract_state.to_dict(), setup.shardings.to_dict())
    state = TrainState(**store.restore(wanted, iterator))
    return state, int(state.step)


def _one_step(step, state, batch, mesh, transform):
    """Runs a step to its end: metrics on the host, and the seconds it took."""
    began = time.monotonic()
    on_devices = to_devices(batch, mesh)
    if transform is not None:
        on_devices = transform(on_devices)
    state, metrics = step(state, on_devices)
    metrics = jax.device_get(
        metrics
    )  # waits: collectives of two steps in flight can starve each other
    return state, metrics, time.monotonic() - began


def _check(alarms: Alarms, line: dict[str, Any], store: CheckpointStore) -> None:
    try:
        alarms.check(line)
    except TrainingAlarm as alarm:
        good = store.latest_step
        kept = (
            f"the last checkpoint before it is at step {good}"
            if good
            else "no checkpoint came before"
        )
        raise TrainingAlarm(f"{alarm}; {kept}, in {store.directory}") from None


@dataclass
class _Stop:
    signal: int | None = None


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes SIGINT or SIGTERM instead of dying of it; a second SIGINT interrupts at once."""
    stop = _Stop()

    def note(number: int, _: object) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        print("\nstopping after this step ...", flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
