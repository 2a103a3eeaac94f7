"""Every run builds: shapes, shardings and the whole train step, without allocating anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import models
from configs.cli import known_runs
from parallel.mesh import AXES
from train.distill import make_chunk_loss
from train.losses import cross_entropy
from train.state import make_train_setup
from train.step import make_train_step


def batch_of(run) -> dict[str, jax.ShapeDtypeStruct]:
    rows = jax.ShapeDtypeStruct((run.batch_size, run.data.seq_len), jnp.int32)
    batch = {"tokens": rows, "targets": rows, "positions": rows}
    if run.distill is not None:
        shape = (run.batch_size, run.data.seq_len, 64)
        batch["teacher_hidden"] = (jax.ShapeDtypeStruct(shape, jnp.float32),)
        w_DV = jax.ShapeDtypeStruct((64, run.model.vocab_size), jnp.float32)
        batch["shared"] = {"teacher_output": (w_DV,)}
    return batch


SLOW = {"v31", "v31_small"}  # to trace 24 layers takes as long as all others


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in known_runs()]
)
@pytest.mark.thinned(4)
@pytest.mark.sampled
def test_a_run_builds_abstractly(name):
    run = known_runs()[name]()
    sizes = (run.mesh.data, run.mesh.expert, run.mesh.tensor)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    setup = make_train_setup(run, mesh)
    state = setup.abstract_state
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert size == run.model.num_parameters + run.model.num_multi_token_parameters
    chunk_loss = make_chunk_loss(run.distill) if run.distill else cross_entropy
    with jax.sharding.use_abstract_mesh(mesh):
        new_state, metrics = jax.eval_shape(
            make_train_step(run, setup, chunk_loss), state, batch_of(run)
        )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


def test_full_sizes_have_the_articles_numbers():
    names = ("v1", "v2", "v3_7b", "v31")
    v1, v2, v3, v31 = (known_runs()[name]().model for name in names)
    assert v1.num_parameters == pytest.approx(1.2e9, rel=0.02)
    assert v2.num_parameters == pytest.approx(3.5e9, rel=0.02)
    assert v1.memory_length == 1024
    assert v3.num_parameters == pytest.approx(7e9, rel=0.1)
    assert [spec.ffn.num_experts for spec in v3.pattern] == [64]
    assert {spec.ffn.num_experts for spec in v31.pattern} == {128}
    assert (v3.context_length, v31.context_length) == (32_768, 100_000)
    assert {spec.ffn.router.mean_k for spec in v3.pattern} == {1.5}
    assert {spec.ffn.router.mean_k for spec in v31.pattern} == {2.0}


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [(models.deepseek_v3(), 671e9, 37e9), (models.deepseek_v2_lite(), 15.7e9, 2.4e9)],
    ids=["DeepSeek-V3", "DeepSeek-V2-Lite"],
)
def test_public_models_have_the_published_counts(model, total, active):
    """Published to two digits where active, without the embedding that is only looked up."""
    assert model.num_parameters == pytest.approx(total, rel=0.001)
    looked_up = model.vocab_size * model.d_model
    assert model.num_active_parameters - looked_up == pytest.approx(active, rel=0.025)


def test_mixtral_has_the_published_counts():
    """Published to three digits, active ones with both embeddings."""
    model = models.mixtral_8x7b()
    assert model.num_parameters == pytest.approx(46.7e9, rel=0.001)
    assert model.num_active_parameters == pytest.approx(12.9e9, rel=0.005)


def test_the_student_has_at_most_a_quarter_of_its_teacher():
    teacher, student = (known_runs()[n]().model for n in ("v31_nano", "v31_nano_student"))
    assert student.num_parameters <= teacher.num_parameters / 4
    assert teacher.pattern[0].ffn.num_experts >= 16


def test_each_device_holds_its_share_of_v31():
    run = known_runs()["v31"]()
    sizes = (run.mesh.data, run.mesh.expert, run.mesh.tensor)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    setup = make_train_setup(run, mesh)
    shares = jax.tree.map(
        lambda x, s: np.prod(s.shard_shape(x.shape)),
        setup.abstract_state.params,
        setup.shardings.params,
    )
    per_device = sum(int(x) for x in jax.tree.leaves(shares))
    # Experts (13.4B of 14.0B) are split over all 128 devices, the rest over data = 8 only.
    assert per_device < 2 * run.model.num_parameters / run.mesh.num_devices
