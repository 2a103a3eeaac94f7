"""The checkpoint store: what is saved comes back, on any mesh, and damage is named."""

import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.orbax_store import CheckpointStore, abstract_like, latest_step, restore_variables
from configs.checks import UserError
from data.pipeline import batches, prepare_corpus
from parallel.mesh import make_mesh
from tests import tiny


class State(struct.PyTreeNode):
    step: object
    params: object


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("store")
    tiny.write_sources(tmp_path)
    return prepare_corpus(tiny.run(tmp_path).data, 300).training()


def iterator_of(file):
    return batches(file, seq_len=32, batch_size=4, seed=0)


def place(mesh, step: int = 0):
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    values = jnp.arange(64.0).reshape(8, 8) + step
    return State(jnp.int32(step), {"w": jax.device_put(values, sharding), "b": jnp.ones(3)})


def layout(mesh):
    state = jax.eval_shape(lambda: place(make_mesh()))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("expert"))
    return abstract_like(state, State(everywhere, {"w": split, "b": everywhere}))


def test_state_and_iterator_come_back_on_another_mesh(tmp_path, file):
    iterator = iterator_of(file)
    next(iterator)
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.latest_step is None
        store.save(1, place(make_mesh(1, 4, 1), 1), iterator)
    expected = next(iterator)
    fresh = iterator_of(file)
    mesh = make_mesh(1, 2, 1)
    with CheckpointStore(tmp_path, keep=2) as store:
        state = store.restore(layout(mesh), fresh)
    np.testing.assert_array_equal(state.params["w"], np.arange(64).reshape(8, 8) + 1)
    assert state.params["w"].sharding.is_equivalent_to(layout(mesh).params["w"].sharding, 2)
    np.testing.assert_array_equal(next(fresh)["row"], expected["row"])


def test_a_save_in_the_background_keeps_the_values_of_its_step(tmp_path, file):
    """The training step reuses the state's buffers while they are being written."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, iterator = place(make_mesh()), iterator_of(file)
    big = State(state.step, {**state.params, "w": jnp.zeros((1000, 1000))})
    with CheckpointStore(tmp_path, keep=9) as store:
        for step in range(1, 5):
            big = advance(big)
            store.save(step, big, iterator)
            for _ in range(3):
                big = advance(big)
    abstract = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    variables, found = restore_variables(tmp_path, {"params": abstract})
    assert found == 4
    np.testing.assert_array_equal(variables["params"]["w"], 13.0)  # 3 x 4 advances, then one


def test_only_the_newest_are_kept(tmp_path, file):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (2, 4, 6):
            store.save(step, place(make_mesh(), step), iterator_of(file))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]
    assert latest_step(tmp_path) == 6
    assert latest_step(tmp_path / "nowhere") is None


def test_parameters_alone_without_the_rest(tmp_path, file):
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(3, place(make_mesh(1, 8, 1), 3), iterator_of(file))
    abstract = {"params": layout(make_mesh()).params}
    variables, step = restore_variables(tmp_path, abstract)
    assert step == 3
    np.testing.assert_array_equal(variables["params"]["w"], np.arange(64).reshape(8, 8) + 3)


def test_leftovers_of_an_interrupted_save_are_cleared(tmp_path, file):
    with CheckpointStore(tmp_path, keep=2) as store:
        store.save(1, place(make_mesh(), 1), iterator_of(file))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.latest_step == 1
    assert latest_step(tmp_path) == 1


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_checkpoint_is_named_with_what_to_do(tmp_path, file, share, capfd):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2):
            store.save(step, place(make_mesh(), step), iterator_of(file))
    victim = largest_file(tmp_path / "2" / "state")
    os.truncate(victim, int(victim.stat().st_size * share))
    with (
        CheckpointStore(tmp_path, keep=2) as store,
        pytest.raises(UserError, match=r"/2 can't be read.*the one before is at step 1"),
    ):
        store.restore(layout(make_mesh()), iterator_of(file))
    with pytest.raises(UserError, match="can't be read"):
        restore_variables(tmp_path, {"params": layout(make_mesh()).params})
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_ends_after_a_failed_load_prints_nothing(tmp_path, file, capfd):
    """As tensorstore's threads do, whose event loop is closed by then; others still print."""
    with pytest.raises(UserError):
        restore_variables(tmp_path, {})
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, place(make_mesh(), 1), iterator_of(file))

    def fail(where: str) -> None:
        try:
            exec(compile("1 / 0", where, "exec"))
        except ZeroDivisionError as error:
            sys.excepthook(type(error), error, error.__traceback__)

    for where in ("uvloop/loop.pyx", "elsewhere.py"):
        thread = threading.Thread(target=fail, args=(where,))
        thread.start()
        thread.join()
    err = capfd.readouterr().err
    assert "elsewhere.py" in err
    assert "uvloop" not in err


def test_other_shapes_are_refused(tmp_path, file):
    with CheckpointStore(tmp_path, keep=2) as store:
        store.save(1, place(make_mesh(), 1), iterator_of(file))
    wrong = {
        "w": jax.ShapeDtypeStruct((4, 8), jnp.float32),
        "b": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    with pytest.raises(UserError, match="can't be read"):
        restore_variables(tmp_path, {"params": wrong})
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_variables(tmp_path / "empty", {"params": wrong})
