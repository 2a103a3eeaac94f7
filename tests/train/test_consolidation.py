"""Teaching further: the Fisher information of a logistic model, its pull on the weights, experts
that stay, and the measures of stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.checks import UserError
from configs.further import FurtherConfig
from configs.optimizer import OptimizerConfig
from model.transformer import Transformer, abstract_variables
from scripts import further
from tests import tiny
from train.consolidation import (
    keeping,
    mean_square,
    penalty,
    with_fisher,
)
from train.continual import as_table, continual_metrics
from train.loop import fit
from train.metrics import read_lines
from train.optim import make_schedule

RNG = np.random.RandomState(0)


def test_the_fisher_information_of_a_logistic_model_is_the_exact_one():
    """F = mean of p (1 - p) x^2 over the data."""
    w, x_N3 = jnp.float32([0.5, -1.0, 0.2]), RNG.randn(3000, 3).astype(np.float32)

    def gradient(w, row, key):
        """Of ten tokens at once, as a row has several."""
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(row @ w))
        return jax.grad(lambda w: _log_likelihood(w, row, drawn))(w), len(row)

    found = mean_square(gradient, w, iter(x_N3.reshape(300, 10, 3)), 0)
    p = 1 / (1 + np.exp(-x_N3 @ np.asarray(w)))
    exact = (p * (1 - p))[:, None] * x_N3**2
    np.testing.assert_allclose(found, exact.mean(0), rtol=0.25)  # 3 standard errors of 300 rows


def _log_likelihood(w, x, y):
    logits = x @ w
    return (y * logits - jnp.logaddexp(0.0, logits)).sum()


def test_weights_come_to_rest_between_the_old_and_the_new():
    """Of a quadratic loss h/2 (w - 1)^2: where h (w - 1) + lambda F (w - w0) = 0."""
    h, fisher, strength = jnp.float32([1.0, 1.0, 2.0]), jnp.float32([0.0, 1.0, 3.0]), 2.0
    optimizer = keeping(FurtherConfig(consolidation=strength), optax.sgd(0.1))
    w = {"w": jnp.float32([0.2, -0.5, 0.0])}
    state, begin = with_fisher(optimizer.init(w), {"w": fisher}), w["w"]
    for _ in range(300):
        updates, state = optimizer.update({"w": h * (w["w"] - 1)}, state, w)
        w = optax.apply_updates(w, updates)
    rest = (h + strength * fisher * begin) / (h + strength * fisher)
    np.testing.assert_allclose(w["w"], rest, atol=1e-6)
    expected = 0.5 * (fisher * (w["w"] - begin) ** 2).sum()
    assert penalty(state, w) == pytest.approx(float(expected), rel=1e-6)
    sgd = optax.sgd(0.1)
    assert keeping(FurtherConfig(), sgd) is sgd


def test_frozen_experts_and_all_that_is_no_expert_stay(tmp_path):
    """With decay and momentum at work, after two updates."""
    run = tiny.run(tmp_path, further=FurtherConfig(frozen_experts=5))
    abstract, _ = abstract_variables(Transformer(run.model))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), abstract["params"])
    optimizer = keeping(run.further, optax.adamw(0.1, weight_decay=0.1))
    state, now = jax.jit(optimizer.init)(params), params

    @jax.jit
    def update(state, now):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, now)
        return state, optax.apply_updates(now, updates)

    for _ in range(2):
        state, now = update(state, now)
    moved = {
        jax.tree_util.keystr(path): a != np.asarray(b)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(now), strict=True
        )
    }
    experts = {n: x for n, x in moved.items() if "'moe'" in n and "shared" not in n}
    assert {n.split("'")[-2] for n in experts} == {"gate_up", "down", "router"}
    for name, x in experts.items():
        x_E = np.moveaxis(x, -1 if "router" in name else 1, 0)
        assert not x_E[:5].any(), name
        assert x_E[5:].all(), name
    assert not any(x.any() for n, x in moved.items() if n not in experts)


def test_measures_of_stages():
    """Numbers of three stages, worked out by hand."""
    scores = np.array([[-1.0, -5.0, -4.0], [-2.0, -1.0, -3.0], [-1.5, -3.0, -1.0]])
    before = np.array([-6.0, -6.0, -6.0])
    found = continual_metrics(scores, before)
    assert found.final == pytest.approx((-1.5 - 3 - 1) / 3)
    assert found.backward_transfer == pytest.approx((-0.5 - 2.0) / 2)
    assert found.forgetting == pytest.approx((0.5 + 2.0) / 2)
    assert found.forward_transfer == pytest.approx((1.0 + 3.0) / 2)
    first = continual_metrics(scores[:1], before)
    assert (first.backward_transfer, first.forgetting) == (None, None)
    assert first.forward_transfer == 1.0
    assert as_table(["a", "b", "c"], scores, before).splitlines()[2].split() == [
        "a", "1.0000", "5.0000", "4.0000",
    ]  # fmt: skip


def test_an_endless_schedule():
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule="infinite",
        warmup_steps=10,
        cooldown_fraction=0.2,
        constant_ratio=0.5,
        decay_fraction=0.1,
        final_ratio=0.0,
    )
    rate = make_schedule(config, 100)
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0)
    assert rate(20) == pytest.approx(0.75)  # half way down the cosine
    assert [float(rate(i)) for i in (30, 60, 89)] == pytest.approx([0.5] * 3)
    assert rate(94) == pytest.approx(0.25)
    assert rate(99) == pytest.approx(0.0)
    forever = make_schedule(dataclasses.replace(config, decay_fraction=None), 100)
    assert forever(99) == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"constant_ratio=0\.5 goes with schedule='infinite'"):
        OptimizerConfig(learning_rate=1.0, warmup_steps=1, constant_ratio=0.5)


def test_settings_that_keep_nothing(tmp_path):
    tiny.write_sources(tmp_path)
    held = tiny.run(tmp_path, further=FurtherConfig(consolidation=1.0))
    with pytest.raises(UserError, match=r"name a run as init\.source"):
        fit(held, tmp_path / "held")
    with pytest.raises(UserError, match=r"frozen_experts=8 must be below the experts .* \(8\)"):
        tiny.run(tmp_path, further=FurtherConfig(frozen_experts=8))
    with pytest.raises(UserError, match="leave nothing old to be consolidated"):
        FurtherConfig(frozen_experts=1, consolidation=1.0)
    with pytest.raises(UserError, match="has no effect without"):
        FurtherConfig(fisher_rows=5)


STAGES = """
import dataclasses
from pathlib import Path

from configs.further import FurtherConfig
from tests import tiny

HERE = Path(__file__).parent

def stages():
    old = tiny.run(HERE / "old", steps=4)
    new = tiny.run(HERE / "new", steps=4)
    held = dataclasses.replace(new, further=FurtherConfig(consolidation={strength}, fisher_rows=4))
    return {{"old": old, "new": held}}
"""


@pytest.mark.slow
def test_stages_one_after_the_other(tmp_path, monkeypatch, capsys):
    """Two, the second held near the first; the same command finds all done."""
    tiny.write_sources(tmp_path / "old", files=9)
    tiny.write_sources(tmp_path / "new", files=9, word="amount")
    (tmp_path / "mine.py").write_text(STAGES.format(strength=10.0))
    arguments = [f"{tmp_path / 'mine.py'}:stages", "--dir", str(tmp_path / "stages")]
    monkeypatch.setattr(further.command, "use_host_devices", lambda count: None)
    assert further.main(arguments) == 0
    text = capsys.readouterr().out
    assert "backward transfer" in text
    known = further._read(tmp_path / "stages", ["old", "new"])
    scores, before = np.array(known["scores"]), np.array(known["before"])
    assert (scores[0] > before).all()  # learnt, and the other text is like it
    assert (scores[1] > scores[0]).all()
    pull = [line["consolidation"] for line in read_lines(tmp_path / "stages/new/metrics.jsonl")]
    assert pull[0] == 0  # it began where it is held
    assert all(value > 0 for value in pull[1:])
    assert (tmp_path / "stages" / "report.html").exists()
    assert further.main(arguments) == 0
    assert further._read(tmp_path / "stages", ["old", "new"])["scores"] == known["scores"]
    assert "all 4 steps were done before" in capsys.readouterr().out
