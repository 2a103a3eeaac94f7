"""The loss of multi-token modules: by hand over packed documents, in the step, and off by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import RouterConfig
from infer.run_weights import load_model
from model.transformer import Transformer, output_weights, training_pass
from tests import tiny
from tests.probes import drawn
from train.loop import fit
from train.losses import cross_entropy
from train.metrics import read_lines
from train.multi_token import count_ahead, multi_token_loss, targets_ahead

ROUTER = RouterConfig(top_k=2, scores="sigmoid", balance="loss_free", bias_rate=1e-3)
LAYER = LayerSpec(attention=tiny.attention(), ffn=tiny.moe(router=ROUTER))
CONFIG = tiny.model(multi_token=MultiTokenConfig(depth=2, layer=LAYER))
POSITIONS = np.array([[*range(7), *range(1), *range(8)], [*range(3), *range(13)]], np.int32)
LENGTH = POSITIONS.shape[1]
STREAM = np.random.RandomState(3).randint(1, 300, (2, LENGTH + 1)).astype(np.int32)
TOKENS, TARGETS = STREAM[:, :-1], STREAM[:, 1:].copy()
TARGETS[1, 5] = -1  # not scored


def by_hand(logits, k: int, shift: int = 1):
    """Summed nats of module k at every place whose tokens up to k + 1 ahead are of its document;
    `shift` 0 is the wrong version that predicts the token it has read."""
    nats, count = 0.0, 0
    for row in range(2):
        documents = np.cumsum(POSITIONS[row] == 0)
        for t in range(LENGTH - k):
            seen = [p for p in range(t, t + k + 2) if p < LENGTH]
            if TARGETS[row, t + k] < 0 or len({documents[p] for p in seen}) > 1:
                continue
            x = np.float64(logits[row, t])
            nats += np.log(np.exp(x).sum()) - x[STREAM[row, t + k + shift]]
            count += 1
    return nats, count


@pytest.fixture(scope="module")
def variables():
    """With an output layer that tells tokens apart."""
    drawn_variables = drawn(CONFIG)
    drawn_variables["params"]["output"] *= 20
    return drawn_variables


@jax.jit
def loss_of(variables):
    model = Transformer(CONFIG)
    _, sown, _ = training_pass(model, variables, TOKENS, POSITIONS)
    w = output_weights(model, variables)
    counts = count_ahead(TARGETS, POSITIONS, CONFIG.multi_token)
    inputs = {"targets": TARGETS}
    loss = multi_token_loss(
        cross_entropy, sown["multi_token"], w, inputs, POSITIONS, None, 2, counts
    )
    return loss, [h[0] @ w for _, h in sorted(sown["multi_token"].items())], counts


def test_equals_the_loss_by_hand_and_not_an_off_by_one(variables):
    loss, logits, counts = loss_of(variables)
    sums = [by_hand(logits[k - 1], k) for k in (1, 2)]
    assert [count for _, count in sums] == [int(count) for count in counts]
    assert loss == pytest.approx(np.mean([nats / count for nats, count in sums]), rel=1e-5)
    wrong = [by_hand(logits[k - 1], k, shift=0) for k in (1, 2)]
    assert abs(loss - np.mean([nats / count for nats, count in wrong])) > 0.005  # tolerance: 7e-5


def test_places_whose_future_is_another_document_are_left_out():
    found = targets_ahead(TARGETS, POSITIONS, 1)
    # Documents of 7, 1 and 8 tokens: the last two places of each have no second token of it, but
    # the row's end hides whether its document goes on.
    assert (np.flatnonzero(found[0] < 0) == [5, 6, 7, LENGTH - 1]).all()
    np.testing.assert_array_equal(found[0, :5], STREAM[0, 2:7])
    assert found[0, LENGTH - 2] == STREAM[0, LENGTH]


def test_padding_is_not_counted():
    positions = np.where(np.arange(LENGTH) < 9, np.arange(LENGTH), -1)[None].astype(np.int32)
    found = targets_ahead(TARGETS[:1], positions, 1)
    assert (found[0, 7:] == -1).all()
    assert (found[0, :7] >= 0).all()


@pytest.mark.slow
def test_the_gradient_reaches_the_trunk(variables):
    grads = jax.jit(jax.grad(lambda v: loss_of(v)[0]))(variables)["params"]
    norms = {k: float(jnp.abs(grads[k]).max()) for k in ("embedding", "output")}
    norms["first layer"] = float(jnp.abs(grads["periods"]["layer_0"]["attention"]["q"]).max())
    norms["first module"] = float(jnp.abs(grads["multi_token_0"]["projection"]).max())
    assert min(norms.values()) > 1e-4, norms


def trained(tmp_path, name, accumulation):
    """A run whose objective does not depend on micro-batches, and its log."""
    tiny.write_sources(tmp_path)
    router = dataclasses.replace(ROUTER, load_balance_weight=0)
    layer = dataclasses.replace(LAYER, ffn=tiny.moe(router=router))
    model = tiny.model(
        pattern=(layer,), num_layers=1, multi_token=MultiTokenConfig(depth=1, layer=layer)
    )
    run = tiny.run(tmp_path, steps=3, model=model, accumulation=accumulation)
    fit(run, tmp_path / name)
    return run, read_lines(tmp_path / name / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_logs_it_and_moves_the_modules_router(tmp_path):
    run, log = trained(tmp_path, "run", 1)
    assert log[0]["multi_token"] == pytest.approx(np.log(300), rel=0.3)
    assert log[-1]["multi_token"] < log[0]["multi_token"]
    assert len(log[0]["load_cv"]) == 2  # the model's layer, then the module's
    _, variables = load_model(run, tmp_path / "run")
    bias_E = variables["router_state"]["multi_token_0"]["layer"]["moe"]["state"].bias_E
    assert bias_E.shape == (8,)
    assert np.abs(bias_E).max() == pytest.approx(3e-3, rel=1e-3)  # three steps of bias_rate


@pytest.mark.slow
def test_micro_batches_add_up_to_the_whole(tmp_path):
    (_, whole), (_, parts) = (trained(tmp_path, str(n), n) for n in (1, 4))
    for name in ("loss", "multi_token", "grad_norm", "load_cv"):
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)  # float32 sums, other order


def test_rows_too_short_to_look_ahead_are_refused(tmp_path):
    far = MultiTokenConfig(depth=32, layer=LAYER)
    with pytest.raises(UserError, match=r"depth=32 must be below data.seq_len=32"):
        tiny.run(tmp_path, model=tiny.model(multi_token=far))
