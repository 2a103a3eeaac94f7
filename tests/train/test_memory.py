"""Training with memory: what a step reads, that it resumes bit for bit on any mesh, and that
checkpoints of models without memory have the form they always had.
"""

import dataclasses
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from checkpoint.orbax_store import CheckpointStore
from configs.base import DistillConfig, MeshConfig
from configs.checks import UserError
from configs.optimizer import OptimizerConfig
from data.pipeline import batches, prepare_corpus
from infer.run_weights import load_model
from model.transformer import hidden_states, output_weights
from parallel.mesh import BATCH_AXES
from tests import tiny
from tests.train.test_loop import SUMS, losses, stop_after
from train.distill import Teacher, distill
from train.loop import fit, mesh_of
from train.state import init_state, make_train_setup
from train.step import make_train_step

STEPS, STOP = 24, 10  # an epoch of the tiny corpus is 20 steps


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run on two devices, and its sources."""
    tmp_path = tmp_path_factory.mktemp("memory")
    tiny.write_sources(tmp_path)
    return tiny.memory_run(tmp_path, steps=STEPS, mesh=MeshConfig(expert=2)), tmp_path


@pytest.fixture(scope="module")
def story(begun):
    """That run unbroken, over an epoch's end, and the same one stopped before."""
    run, tmp_path = begun
    fit(run, tmp_path / "unbroken")
    fit(run, tmp_path / "stopped", make_transform=stop_after(STOP, signal.SIGTERM))
    return run, tmp_path


def resume(story, mesh: MeshConfig) -> list[float]:
    run, tmp_path = story
    name = f"resumed {mesh.data} {mesh.expert}"
    shutil.copytree(tmp_path / "stopped", tmp_path / name)
    fit(dataclasses.replace(run, mesh=mesh), tmp_path / name)
    return losses(tmp_path / name)


@pytest.mark.slow
def test_it_learns_and_resumes_bit_for_bit(story):
    run, tmp_path = story
    unbroken = losses(tmp_path / "unbroken")
    assert unbroken[-1] < unbroken[0] - 0.5
    assert resume(story, run.mesh) == unbroken


@pytest.mark.slow
def test_resumed_on_another_mesh_stays_within_rounding(story):
    unbroken = losses(story[1] / "unbroken")
    # The rounding of 14 steps grows through the updates; 1e-5 is that of the sums of one.
    ours = resume(story, MeshConfig(data=2, tensor=2))
    np.testing.assert_allclose(ours, unbroken, rtol=10 * SUMS)


def stream_of(run):
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    return batches(
        corpus.training(),
        seq_len=run.data.seq_len,
        batch_size=run.batch_size,
        seed=run.seed,
        order="streams",
    )


@pytest.mark.slow
def test_the_memory_lies_where_the_rows_do(begun):
    run, _ = begun
    setup = make_train_setup(run, mesh_of(run))
    specs = {tuple(s.spec) for s in jax.tree.leaves(setup.shardings.memory)}
    assert specs == {(None, BATCH_AXES, None, None), (None, BATCH_AXES, None)}


def test_steps_train_on_what_one_long_pass_predicts(begun, tmp_path):
    """Three steps at a rate too small to change a weight: their losses are those of rows three
    times as long, read at once. Rows read on their own, the wrong version, have others.
    """
    run, _ = begun
    still = OptimizerConfig(learning_rate=1e-30, warmup_steps=0, weight_decay=0.0)
    run = dataclasses.replace(run, steps=3, optimizer=still)
    fit(run, tmp_path / "still")
    found = losses(tmp_path / "still")
    iterator = stream_of(run)
    steps = [next(iterator) for _ in range(3)]
    tokens, targets, positions = (
        np.concatenate([step[name] for step in steps], axis=1)
        for name in ("tokens", "targets", "positions")
    )
    model, variables = load_model(run, tmp_path / "still")

    @jax.jit
    def nats(variables, positions):
        hidden, _ = hidden_states(model, variables, tokens, positions)
        log_p = jax.nn.log_softmax(hidden @ output_weights(model, variables))
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)
        return -picked.reshape(run.batch_size, 3, -1).mean(axis=(0, 2))

    np.testing.assert_allclose(found, nats(variables, positions), rtol=SUMS)
    alone = nats(variables, np.tile(np.arange(run.data.seq_len), (run.batch_size, 3)))
    assert np.abs(alone[1:] - np.array(found)[1:]).min() > 1e-4


def test_a_teacher_with_memory_is_refused(begun, tmp_path):
    run, sources = begun
    student = tiny.run(sources, distill=DistillConfig())

    def load(_mesh) -> Teacher:
        raise AssertionError("it was loaded")

    tokenizer = prepare_corpus(run.data, run.model.vocab_size).tokenizer()
    with pytest.raises(UserError, match="the teacher has memory_length=24"):
        distill(student, tmp_path / "student", run.model, load, tokenizer)


class Before(struct.PyTreeNode):
    """The training state of the versions that knew of no memory."""

    step: Any
    params: Any
    router_state: Any
    opt_state: Any


def test_checkpoints_without_memory_keep_their_form(begun, tmp_path):
    """What the versions before wrote is read, and nothing else is written."""
    _, sources = begun
    run = tiny.run(sources, steps=3)
    parts = make_train_setup(run, mesh_of(run)).abstract_state.to_dict()
    assert set(parts) == {field.name for field in dataclasses.fields(Before)}
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), Before(**parts))
    rows = prepare_corpus(run.data, run.model.vocab_size).training()
    iterator = batches(rows, seq_len=run.data.seq_len, batch_size=run.batch_size, seed=run.seed)
    with CheckpointStore(tmp_path / "plain" / "checkpoints", keep=2) as store:
        store.save(3, state.replace(step=jnp.int32(3)), iterator)
    (tmp_path / "plain" / "metrics.jsonl").touch()
    assert fit(run, tmp_path / "plain").steps == 3


# --- What memory is for -------------------------------------------------------------------------

DISTANCE, COPY_STEPS = 24, 400  # the copied token lies beyond a segment of 16


def copy_batches(rows: int, segment: int):
    """Endless segments of streams in which 24 random tokens are followed by their copy; only the
    copy is predicted.
    """
    random = np.random.RandomState(0)
    begin, tokens = 0, np.zeros((rows, 0), np.int32)
    while True:
        while tokens.shape[1] <= segment:
            block = random.randint(1, 33, (rows, DISTANCE)).astype(np.int32)
            tokens = np.concatenate([tokens, block, block], axis=1)
        places = np.broadcast_to(begin + np.arange(segment, dtype=np.int32), (rows, segment))
        is_copy = (places + 1) % (2 * DISTANCE) >= DISTANCE
        targets = np.where(is_copy, tokens[:, 1 : segment + 1], -1)
        yield {"tokens": tokens[:, :segment], "targets": targets, "positions": places}
        begin, tokens = begin + segment, tokens[:, segment:]


@pytest.mark.slow
@pytest.mark.parametrize("remembers", [True, False])
def test_copying_from_beyond_a_segment_takes_memory(tmp_path, remembers):
    """With memory solved; with an empty one at each step at chance, log 32."""
    base = tiny.memory_run(tmp_path, steps=COPY_STEPS, batch_size=16)
    run = dataclasses.replace(
        base,
        model=tiny.memory_model(memory_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20),
        data=dataclasses.replace(base.data, seq_len=16),
    )
    mesh, found = mesh_of(run), []
    setup = make_train_setup(run, mesh)
    with jax.set_mesh(mesh):
        state, step = init_state(setup, 0), make_train_step(run, setup)
        for _, batch in zip(range(COPY_STEPS), copy_batches(16, 16), strict=False):
            if not remembers:
                state = state.replace(memory=setup.begin_memory())
            state, metrics = step(state, {name: jnp.asarray(x) for name, x in batch.items()})
            if (batch["targets"] >= 0).any():  # every third segment has nothing to copy
                found.append(float(metrics["loss"]))
    last = np.mean(found[-20:])
    assert last < 0.3 if remembers else last > 0.9 * np.log(32)
