"""Training with Mixture-of-Depths and early exit: the exits' loss by hand, skipped rows, a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import EarlyExitConfig, MixtureOfDepthsConfig
from configs.base import MeshConfig, RunConfig
from configs.checks import UserError
from infer.run_weights import load_model
from model.depth import DepthStats
from model.early_exit import dropout_rates, exit_weights, supervised_exits
from model.transformer import Transformer, hidden_states, training_pass
from tests import tiny
from tests.probes import drawn
from train.loop import fit, mesh_of
from train.losses import collect_router_stats, depth_loss
from train.metrics import read_lines
from train.state import init_state, make_train_setup
from train.step import make_train_step

EXITS = EarlyExitConfig(dropout=0.3, loss_scale=0.5, rotation=2)
DENSE = tiny.model().pattern[1]


def exiting(periods: int = 4, **changes):
    early = dataclasses.replace(EXITS, **changes)
    return tiny.model(pattern=(DENSE,), num_layers=periods, early_exit=early)


def batch_of(run: RunConfig):
    random = np.random.RandomState(0)
    shape = (run.batch_size, run.data.seq_len)
    tokens, targets = random.randint(0, 300, (2, *shape)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {"tokens": tokens, "targets": targets, "positions": positions}


def test_weights_and_rates_by_hand():
    """LayerSkip with four layers, and with pairs of layers, which stand for their second."""
    one = exiting(4, dropout=0.2, loss_scale=0.1)
    np.testing.assert_allclose(exit_weights(one), [0, 0.1, 0.3, 3 + 0.3], rtol=1e-6)
    cube = 2 ** (1 / 3)
    rates = [0, 0.2 * (cube - 1), 0.2 * (cube**2 - 1), 0.2]
    np.testing.assert_allclose(dropout_rates(one), rates, atol=1e-7)
    pairs = dataclasses.replace(one, pattern=(DENSE, DENSE))
    np.testing.assert_allclose(exit_weights(pairs), [0.1, 3 + 0.3], rtol=1e-6)
    alike = dataclasses.replace(EXITS, weighting="uniform")
    np.testing.assert_allclose(
        exit_weights(dataclasses.replace(one, early_exit=alike)), [0.5, 0.5, 0.5, 1.0]
    )
    np.testing.assert_allclose(dropout_rates(pairs), [0.2 * (cube - 1), 0.2], atol=1e-7)


def test_exits_take_turns():
    turns = [supervised_exits(exiting(6), jnp.int32(step)) for step in range(3)]
    assert [t.periods_K.tolist() for t in turns] == [[0, 2, 4], [1, 3, -1], [0, 2, 4]]
    for turn in turns:
        assert float(turn.weights_K.sum() + turn.last_weight) == pytest.approx(1.0)
    e = 0.5 * np.array([1, 6])  # e(1), e(3)
    last = 5 + 0.5 * 10
    expected = [*e / (e.sum() + last), 0]
    np.testing.assert_allclose(turns[1].weights_K, expected, rtol=1e-6)


def test_a_steps_loss_by_hand(tmp_path):
    """The weighted mean of the exits' cross-entropies, through one norm and one output layer."""
    config = exiting(3, dropout=0.0, rotation=1)
    run = tiny.run(tmp_path, model=config)
    setup, variables = make_train_setup(run, mesh_of(run)), drawn(config)
    state, batch = init_state(setup, 0, variables), batch_of(run)
    _, metrics = make_train_step(run, setup)(state, batch)

    rows = (batch["tokens"], batch["positions"])
    _, sown, _ = jax.jit(lambda v: training_pass(setup.model, v, *rows))(variables)
    params = jax.device_get(variables["params"])
    nats = []
    for x in np.asarray(sown["exits"]["periods"]["hidden"], np.float64):
        h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
        logits = h @ params["output"]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats.append(-np.take_along_axis(log_p, batch["targets"][..., None], axis=2).mean())
    e = np.array([0, 0.5, 2 + 0.5])  # l = 0, 1, and 2 + 0.5 (0 + 1)
    assert float(metrics["loss"]) == pytest.approx((e * nats).sum() / e.sum(), rel=1e-5)
    assert float(metrics["cross_entropy"]) == pytest.approx(nats[2], rel=1e-5)
    np.testing.assert_allclose(metrics["exits"]["cross_entropy"], nats[:2], rtol=1e-5)
    assert metrics["exits"]["period"].tolist() == [0, 1]


def test_rows_skip_periods_as_often_as_configured():
    config = exiting(3)
    model, variables, batch = Transformer(config), drawn(config), 1500
    tokens = np.random.RandomState(0).randint(0, 300, (batch, 2)).astype(np.int32)
    positions = np.broadcast_to(np.arange(2, dtype=np.int32), (batch, 2))

    @jax.jit
    def states(key):
        return training_pass(model, variables, tokens, positions, depth_key=key)[1]["exits"][
            "periods"
        ]

    x_PBLD = np.asarray(states(jax.random.key(0))["hidden"])
    skipped = [(x_PBLD[p] == x_PBLD[p - 1]).all(axis=(1, 2)) for p in (1, 2)]
    rates = 0.3 * np.array([2**0.5 - 1, 1])
    sigma = np.sqrt(rates * (1 - rates) / batch)
    np.testing.assert_allclose([s.mean() for s in skipped], rates, atol=4 * sigma.max())
    assert (x_PBLD[0] != np.asarray(states(jax.random.key(1))["hidden"])[1]).any()


def test_no_chance_of_skipping_is_no_skipping():
    never = exiting(3, dropout=0.0)
    tokens, positions = (jax.ShapeDtypeStruct((4, 8), jnp.int32),) * 2

    def lowered(key):
        model = Transformer(never)
        run = jax.jit(lambda v, t, p: training_pass(model, v, t, p, depth_key=key)[:2])
        return run.lower(drawn(never), tokens, positions).as_text()

    assert lowered(jax.random.key(0)) == lowered(None)


def test_inference_with_early_exit_is_the_same_program_as_without():
    """States after each period are kept only where someone asks for them."""
    tokens, positions = (jax.ShapeDtypeStruct((4, 8), jnp.int32),) * 2

    def lowered(config):
        run = jax.jit(lambda v, t, p: hidden_states(Transformer(config), v, t, p))
        return run.lower(drawn(config), tokens, positions).as_text()

    assert lowered(exiting()) == lowered(dataclasses.replace(exiting(), early_exit=None))


def test_a_skipped_row_reaches_no_expert():
    config = tiny.model(num_layers=4, early_exit=dataclasses.replace(EXITS, dropout=0.9))
    variables = drawn(config)
    tokens = np.zeros((64, 4), np.int32)
    positions = np.broadcast_to(np.arange(4, dtype=np.int32), (64, 4))
    run = jax.jit(
        lambda key: training_pass(Transformer(config), variables, tokens, positions, depth_key=key)[
            1
        ]
    )
    sown = run(jax.random.key(0))
    stats = collect_router_stats(sown, config)["layer_0"]
    x_PBLD = np.asarray(sown["exits"]["periods"]["hidden"])
    kept = 64 - (x_PBLD[1] == x_PBLD[0]).all(axis=(1, 2)).sum()
    assert 0 < kept < 64
    assert float(stats.num_tokens[1]) == 4 * kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both mechanisms at once, over micro-batches, on two devices."""
    tmp_path = tmp_path_factory.mktemp("depth")
    tiny.write_sources(tmp_path)
    routed = dataclasses.replace(DENSE, depth=MixtureOfDepthsConfig(capacity=0.25))
    config = tiny.model(pattern=(routed,), num_layers=3, early_exit=EXITS)
    mesh = MeshConfig(data=2)
    run = tiny.run(tmp_path, model=config, steps=4, accumulation=2, mesh=mesh)
    fit(run, tmp_path / "run")
    return run, tmp_path / "run"


@pytest.mark.slow
def test_a_run_learns_and_logs(trained):
    _, run_dir = trained
    lines = read_lines(run_dir / "metrics.jsonl")
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 0.02
    for line in lines:
        np.testing.assert_allclose(line["chosen_fraction"], [0.25] * 3, atol=1e-4)
        assert all(0 < accuracy <= 1 for accuracy in line["predictor_accuracy"])
        assert line["auxiliary"] > 0
    assert [list(line["exit_cross_entropy"]) for line in lines] == [["1"], ["2"]] * 2
    nats = lines[0]["exit_cross_entropy"]["1"]
    assert nats == pytest.approx(np.log(300), rel=0.3)


@pytest.mark.slow
def test_a_loaded_model_chooses_token_by_token(trained):
    run, run_dir = trained
    model, _ = load_model(run, run_dir)
    assert model.config.pattern[0].depth == MixtureOfDepthsConfig(
        capacity=0.25, selection="threshold"
    )
    with pytest.raises(UserError, match="a run is trained with"):
        dataclasses.replace(run, model=model.config)


def test_the_predictors_loss_is_weighted():
    depth = MixtureOfDepthsConfig(capacity=0.25, predictor_weight=0.1)
    config = tiny.model(pattern=(dataclasses.replace(DENSE, depth=depth),))
    loss = jnp.array([0.5, 0.25])
    layer = DepthStats(loss, jnp.ones(2), jnp.ones(2))
    assert float(depth_loss({"layer_0": layer}, config)) == pytest.approx(0.075)
