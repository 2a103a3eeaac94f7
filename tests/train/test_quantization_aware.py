"""Learning with rounded weights: from which step, by which gradient, and to what end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import UserError
from configs.serialization import from_json, to_json
from configs.tuning import QuantizationAwareConfig
from model.transformer import Transformer, init_variables
from parallel.mesh import make_mesh
from tests import tiny
from train.quantization_aware import first_step, round_all, rounded_params
from train.state import init_state, make_train_setup
from train.step import make_train_step

QAT = QuantizationAwareConfig(weights="int4", last_fraction=0.5, block_size=16)


def batch() -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, 300, (8, 33))
    positions = np.tile(np.arange(32), (8, 1))
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}
    return {k: jnp.asarray(v, jnp.int32) for k, v in arrays.items()}


@pytest.mark.slow
def test_weights_are_rounded_from_the_first_of_the_last_steps_on(tmp_path):
    run = tiny.run(tmp_path, quantization_aware=QAT)
    model = Transformer(run.model, run.execution)
    params = jax.jit(lambda: init_variables(model, 0))()["params"]
    step = first_step(run, QAT)
    assert step == 3
    rounded = jax.jit(lambda p, s: rounded_params(run, model, p, s))
    before, after = rounded(params, step - 1), rounded(params, step)
    ffn = params["periods"]["layer_1"]["ffn"]["down"]
    np.testing.assert_array_equal(before["periods"]["layer_1"]["ffn"]["down"], ffn)
    found = np.asarray(after["periods"]["layer_1"]["ffn"]["down"])[0].T.reshape(32, -1, 16)
    assert max(len(np.unique(block)) for row in found for block in row) <= 16
    table = np.asarray(after["embedding"]).reshape(300, -1, 16)
    assert max(len(np.unique(block)) for row in table for block in row) > 15, "int8"
    norms = [p["periods"]["layer_1"]["ffn_norm"]["scale"] for p in (params, after)]
    np.testing.assert_array_equal(*norms)
    twice = round_all(QAT, model, after)["periods"]["layer_1"]["ffn"]["down"]
    np.testing.assert_allclose(twice, after["periods"]["layer_1"]["ffn"]["down"], rtol=0.02)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_rounded_weights_and_moves_the_masters(tmp_path):
    """A step of rounded masters without the option has the same gradient; the update differs by
    where it starts."""
    run = tiny.run(tmp_path, quantization_aware=dataclasses.replace(QAT, last_fraction=1.0))
    plain = dataclasses.replace(run, quantization_aware=QuantizationAwareConfig())
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        state = init_state(setup, 0)
        masters = jax.tree.map(np.asarray, state.params)
        rounded = round_all(run.quantization_aware, setup.model, masters)
        other = jax.device_put(state.replace(params=rounded), setup.shardings, may_alias=False)
        learned, metrics = make_train_step(run, setup)(state, batch())
        straight, expected = make_train_step(plain, setup)(other, batch())
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)
    moved = np.asarray(learned.params["final_norm"]["scale"]) - masters["final_norm"]["scale"]
    theirs = np.asarray(straight.params["final_norm"]["scale"]) - rounded["final_norm"]["scale"]
    np.testing.assert_allclose(moved, theirs, rtol=1e-3, atol=1e-7)


def test_a_config_keeps_it_and_refuses_nonsense(tmp_path):
    run = tiny.run(tmp_path, quantization_aware=QAT)
    assert from_json(type(run), to_json(run), where="here") == run
    with pytest.raises(UserError, match="last_fraction=0"):
        QuantizationAwareConfig(weights="int4", last_fraction=0)
    with pytest.raises(UserError, match="must be even"):
        QuantizationAwareConfig(weights="int4", block_size=3)
    with pytest.raises(UserError, match="no effect"):
        QuantizationAwareConfig(block_size=16)
