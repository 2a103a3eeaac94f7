"""The optimiser's state after growth, and grown runs: they begin, warm up and resume."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.feed_forward import RouterConfig
from configs.optimizer import OptimizerConfig
from infer.run_weights import load_model
from model.growth import grow, grown_config
from parallel.mesh import make_mesh
from tests import tiny
from tests.train.test_loop import losses, stop_after
from train.growth import grow_optimizer_state, load_grown_optimizer_state
from train.loop import fit
from train.metrics import read_lines
from train.state import make_train_setup

BIASED = RouterConfig(top_k=2, scores="sigmoid", balance="loss_free", bias_rate=1e-3)
LAYER = dataclasses.replace(tiny.model().pattern[0], ffn=tiny.moe(router=BIASED))
MODEL = tiny.model(pattern=(LAYER,), num_layers=1)
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    "muon": OptimizerConfig(kind="muon", momentum=0.9, learning_rate=1e-2, warmup_steps=1),
}


def moments(opt_state, names):
    """{"mu": moment, "nu": moment} of the parameter at these names; Muon has no second one."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
        if tuple(getattr(key, "key", None) for key in path[-len(names) :]) == names:
            found[path[-len(names) - 1].name] = np.asarray(x)
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("operator", "factor"), [("copy", 3), ("reserve", 2), ("split", 2)])
def test_moments_grow_with_their_parameters(tmp_path, kind, operator, factor):
    run = tiny.run(tmp_path, model=MODEL, optimizer=OPTIMIZERS[kind])
    grown = dataclasses.replace(run, model=grown_config(MODEL, operator, factor))
    before, after = (make_train_setup(r, make_mesh(1, 1, 1)).abstract_state for r in (run, grown))
    random = np.random.RandomState(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(random.rand(*x.shape) + 3, x.dtype), before.opt_state
    )
    ours = grow_optimizer_state(state, before.params, operator, factor)
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (ours, after.opt_state)]
    assert described[0] == described[1]

    down = ("periods", "layer_0", "moe", "down")
    old, new = moments(state, down), moments(ours, down)
    assert set(new) == ({"mu", "nu"} if kind == "adamw" else {"mu"})
    for name, x in new.items():
        if operator == "split":
            parts = [old[name][:, :, :8], old[name][:, :, 8:]]
            np.testing.assert_array_equal(x, np.concatenate(parts, axis=1))
        else:
            np.testing.assert_array_equal(x[:, :8], old[name])
            copies = np.concatenate([old[name]] * (factor - 1), axis=1)
            np.testing.assert_array_equal(x[:, 8:], 0 * copies if name == "mu" else copies)
    router = ("periods", "layer_0", "moe", "router")
    old, new = moments(state, router), moments(ours, router)
    np.testing.assert_array_equal(new["mu"][..., 8:], 0)
    np.testing.assert_array_equal(new["nu"][..., 8:16], old["nu"])
    q = ("periods", "layer_0", "attention", "q")
    np.testing.assert_array_equal(moments(ours, q)["mu"], moments(state, q)["mu"])


def test_adams_count_goes_on_and_the_schedule_begins_again(tmp_path):
    run = tiny.run(tmp_path, model=MODEL)
    abstract = make_train_setup(run, make_mesh(1, 1, 1)).abstract_state
    state = jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), abstract.opt_state)
    ours = grow_optimizer_state(state, abstract.params, "copy")
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    parts = jax.tree.leaves(ours, is_leaf=lambda x: isinstance(x, kinds))
    counts = {type(x): int(x.count) for x in parts if isinstance(x, kinds)}
    assert counts == {optax.ScaleByAdamState: 7, optax.ScaleByScheduleState: 0}


def test_an_optimiser_of_another_kind_is_refused():
    params = {"w": jnp.ones(3)}
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(NotImplementedError, match="begin with a fresh state"):
        grow_optimizer_state(state, params, "copy")


@pytest.mark.slow
def test_a_warmed_up_run_resumes_bit_for_bit(tmp_path):
    """Stopped in the middle of the warm-up; the parent's optimiser state goes on, as is the verb's
    default."""
    tiny.write_sources(tmp_path)
    parent = tiny.run(tmp_path, steps=3, model=MODEL)
    fit(parent, tmp_path / "parent")
    _, variables = load_model(parent, tmp_path / "parent")
    run = dataclasses.replace(
        parent, steps=8, model=grown_config(MODEL, "reserve", 2, warmup_steps=6)
    )
    begin = {
        "variables": grow(variables, MODEL, "reserve", 2, warmup_steps=6, drop=0.5),
        "opt_state": load_grown_optimizer_state(parent, tmp_path / "parent", "reserve"),
    }
    second = moments(begin["opt_state"], ("periods", "layer_0", "moe", "down"))["nu"]
    assert second[:, 8:].max() > 0
    np.testing.assert_array_equal(second[:, 8:], second[:, :8])
    fit(run, tmp_path / "unbroken", **begin)
    stop = stop_after(3, signal.SIGTERM)
    assert fit(run, tmp_path / "stopped", make_transform=stop, **begin).steps == 3
    shutil.rmtree(tmp_path / "parent")
    fit(run, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    log = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    load = np.array([line["expert_load"][0] for line in log])
    assert load[0, 8:].sum() == 0
    assert load[7, 8:].mean() > 0.5
    _, after = load_model(run, tmp_path / "stopped")
    warmup = after["router_state"]["periods"]["layer_0"]["moe"]["warmup"]
    assert int(warmup.step[0]) == 8
    assert float(warmup.gap[0]) > 0
