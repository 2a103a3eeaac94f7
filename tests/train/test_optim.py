"""Schedules at their corners, and which parameters Muon, decay and sharding treat how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.base import MeshConfig, OptimizerConfig
from model.transformer import Transformer, abstract_variables
from parallel.mesh import make_mesh
from tests import tiny
from train.optim import make_optimizer, make_schedule
from train.state import make_train_setup

MUON = OptimizerConfig(kind="muon", momentum=0.9, learning_rate=0.1, warmup_steps=0, weight_decay=0)


def test_cosine_warms_up_and_decays_to_the_final_ratio():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_ratio=0.1)
    rate = make_schedule(config, 100)
    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == pytest.approx(2.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(99) == pytest.approx(0.2, rel=1e-3)
    middle = 10 + (99 - 10) / 2
    assert rate(middle) == pytest.approx(1.1, rel=1e-3)


def test_wsd_is_stable_then_linear():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=5, schedule="wsd", decay_fraction=0.2, final_ratio=0.0
    )
    rate = make_schedule(config, 100)
    assert rate(0) == pytest.approx(0.2)
    assert all(float(rate(s)) == pytest.approx(1.0) for s in (5, 40, 79))
    assert rate(89) == pytest.approx(0.5, abs=0.01)
    assert rate(99) == pytest.approx(0.0, abs=1e-6)


def updates_of(config):
    """Random parameters, gradients far above Adam's eps, and the optimiser's first update."""
    abstract, axes = (tree["params"] for tree in abstract_variables(Transformer(tiny.model())))
    optimizer = make_optimizer(config, lambda _: config.learning_rate, axes)
    random = np.random.RandomState(0)

    def draw(x):
        return jnp.asarray(random.randn(*x.shape), jnp.float32)

    params, grads = jax.tree.map(draw, abstract), jax.tree.map(draw, abstract)
    grads = jax.tree.map(lambda g: 1e-3 * (g + jnp.sign(g)), grads)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return params, grads, updates


@pytest.mark.slow
def test_muon_orthogonalises_each_hidden_matrix_alone():
    """Singular values of an update are equal up to Newton-Schulz's spread (0.5 to 1.5 times)."""
    _, _, updates = updates_of(MUON)
    layer = updates["periods"]["layer_0"]
    matrices = {
        "expert 3's gate": layer["moe"]["gate_up"][0, 3, :, 0],
        "expert 5's down": layer["moe"]["down"][0, 5],
        "queries": layer["attention"]["q"][0].reshape(32, -1),
        "values": layer["attention"]["kv"][0, :, 1].reshape(32, -1),
        "output": layer["attention"]["o"][0].reshape(-1, 32),
    }
    for name, matrix in matrices.items():
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 4, name
        rms = np.sqrt(np.mean(np.square(matrix)))
        # 0.2 * sqrt(max(n, m)) * (unit singular values) / sqrt(n m) * sqrt(min): 0.2 for all shapes
        assert rms == pytest.approx(0.1 * 0.2, rel=0.3), name


def test_muon_leaves_embeddings_norms_and_router_to_adamw():
    """Their first update is Adam's with Nesterov momentum (as optax pairs it with Muon): the rate
    times 1 + b1 / (1 + b1), wherever there is a gradient."""
    _, _, updates = updates_of(MUON)
    layer = updates["periods"]["layer_0"]
    for name, update in {
        "embedding": updates["embedding"],
        "output": updates["output"],
        "router": layer["moe"]["router"],
        "norm": layer["ffn_norm"]["scale"],
    }.items():
        expected = 0.1 * (1 + 0.9 / 1.9)
        np.testing.assert_allclose(np.abs(update), expected, rtol=1e-2, err_msg=name)


def test_decay_shrinks_matrices_and_spares_norms():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    without = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    params, _, decayed = updates_of(config)
    _, _, plain = updates_of(without)
    difference = jax.tree.map(lambda a, b: a - b, decayed, plain)
    np.testing.assert_allclose(difference["output"], -0.05 * params["output"], atol=1e-6)
    np.testing.assert_array_equal(difference["final_norm"]["scale"], 0)


def test_clipping_bounds_the_gradient_norm():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=1e-6, eps=1.0)
    _, grads, updates = updates_of(config)
    # With eps = 1 an AdamW update is the clipped gradient itself (up to decay).
    _, _, free = updates_of(OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0))
    assert float(jnp.abs(free["output"] - updates["output"]).max()) > 0
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
    assert norm > 1e-6


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_split_like_their_parameters(tmp_path, kind):
    mesh_config = MeshConfig(data=2, expert=2, tensor=2)
    optimizer = MUON if kind == "muon" else OptimizerConfig(learning_rate=0.1, warmup_steps=0)
    setup = make_train_setup(
        tiny.run(tmp_path, mesh=mesh_config, optimizer=optimizer), make_mesh(2, 2, 2)
    )
    wanted = PartitionSpec(None, "expert", "data", None, "tensor")
    found = [
        sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(setup.shardings.opt_state)
        if "gate_up" in str(path) and "moe" in str(path) and "shared" not in str(path)
    ]
    assert len(found) == (1 if kind == "muon" else 2)  # Muon keeps one moment, AdamW two
    assert all(spec == wanted for spec in found)


@pytest.mark.parametrize(("clip_norm", "scale"), [(None, 1.0), (2.5, 0.5)])
def test_gradients_are_clipped_unless_that_is_left_out(clip_norm, scale):
    """Of a gradient of norm 5, Adam's first moment is (1 - beta1) times what is left."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=clip_norm)
    optimizer = make_optimizer(config, lambda _: 0.1, {"w": ("embed",)})
    params = {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
    np.testing.assert_allclose(moments[0], (1 - config.beta1) * scale * np.array([3.0, 4.0]), 1e-5)
