"""Schedules at their corners, and which parameters Muon, decay and sharding treat how."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs.architecture import LayerSpec
from configs.base import MeshConfig
from configs.feed_forward import DenseConfig
from configs.optimizer import OptimizerConfig
from model.transformer import Transformer, abstract_variables, hidden_states, init_variables
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
        return random.randn(*x.shape).astype(np.float32)

    params, grads = jax.tree.map(draw, abstract), jax.tree.map(draw, abstract)
    grads = jax.tree.map(lambda g: np.float32(1e-3) * (g + np.sign(g)), grads)
    update = jax.jit(
        lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0]
    )
    return params, grads, jax.device_get(update(grads, params))


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
    assert np.abs(free["output"] - updates["output"]).max() > 0
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
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


def test_with_a_base_width_what_reads_the_width_moves_in_proportion_to_it():
    """Adam's first update is the rate in the gradient's direction, here a quarter of it where sums
    grow with d_model; decay, norms, biases and the embedding stay at the whole rate."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, base_width=8, weight_decay=0.5)
    abstract, axes = (tree["params"] for tree in abstract_variables(Transformer(tiny.model())))
    optimizer = make_optimizer(config, lambda _: 0.1, axes, width=32)
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), jnp.float32), abstract)
    grads = jax.tree.map(lambda x: 1e-2 * jnp.sign(x), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    w, u = (tree["periods"]["layer_0"] for tree in (params, updates))
    pairs = {
        "embedding": (params["embedding"], updates["embedding"], 1.0, 0.5),
        "output": (params["output"], updates["output"], 0.25, 0.5),
        "queries": (w["attention"]["q"], u["attention"]["q"], 0.25, 0.5),
        "down": (w["moe"]["down"], u["moe"]["down"], 0.25, 0.5),
        "router": (w["moe"]["router"], u["moe"]["router"], 0.25, 0.0),
        "norm": (w["attention_norm"]["scale"], u["attention_norm"]["scale"], 1.0, 0.0),
    }
    for name, (weights, update, factor, decay) in pairs.items():
        expected = -0.1 * (factor * jnp.sign(weights) + decay * weights)
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_base_width_keeps_the_move_of_the_logits_from_growing_with_the_width():
    """The same rate at eight times the width: the logits after two steps move about as far as the
    narrow model's, where without a base width they move several times as far (Yang et al. 2022)."""

    def moved(width: int, base: int | None) -> float:
        config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, base_width=base)
        attention = tiny.attention(window_size=None, num_sink_tokens=0)
        spec = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=2 * width))
        model = Transformer(tiny.model(d_model=width, pattern=(spec,), num_layers=1))
        _, axes = abstract_variables(model)
        optimizer = make_optimizer(config, lambda _: 1e-2, axes["params"], width=width)
        tokens_BL = np.random.RandomState(1).randint(0, 300, (4, 17))
        inputs_BL, targets_BL = jnp.asarray(tokens_BL[:, :-1]), jnp.asarray(tokens_BL[:, 1:])
        positions_BL = jnp.broadcast_to(jnp.arange(16), inputs_BL.shape)

        def loss(params):
            hidden_BLD, _ = hidden_states(model, {"params": params}, inputs_BL, positions_BL)
            logits_BLV = hidden_BLD @ params["output"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
            return losses.mean(), logits_BLV

        @jax.jit
        def two_steps(params):
            state, before = optimizer.init(params), loss(params)[1]
            for _ in range(2):
                grads = jax.grad(lambda p: loss(p)[0])(params)
                updates, state = optimizer.update(grads, state, params)
                params = optax.apply_updates(params, updates)
            return jnp.sqrt(jnp.mean(jnp.square(loss(params)[1] - before)))

        return float(two_steps(init_variables(model, 0)["params"]))

    narrow = moved(32, None)
    assert moved(32, 32) == pytest.approx(narrow, rel=1e-5)
    assert 0.5 < moved(256, 32) / narrow < 1.5
    assert moved(256, None) / narrow > 3
