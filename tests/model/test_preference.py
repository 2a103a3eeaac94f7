"""Preferences of requests: nothing at zero, more with more, gates untouched, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig, RouterConfig
from model.model_state import init_state
from model.router import route, score_deviation
from model.transformer import Transformer, hidden_states
from tests import tiny
from tests.probes import drawn, inputs

ROUTER = RouterConfig(top_k=2, scores="sigmoid", balance="loss_free", bias_rate=1e-3)
DENSE = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16))
CONFIG = tiny.model(
    pattern=(dataclasses.replace(tiny.model().pattern[0], ffn=tiny.moe(router=ROUTER)), DENSE),
    num_layers=4,
)
MODEL, LENGTH = Transformer(CONFIG), 16


@pytest.fixture(scope="module")
def variables():
    return drawn(CONFIG)


@jax.jit
def forward(variables, tokens, positions, preference):
    return hidden_states(MODEL, variables, tokens, positions, preference=preference)[0]


def wanting(beta: float, experts=(1, 6), rows: int = 1) -> dict[str, jax.Array]:
    return {"layer_0": jnp.zeros((2, rows, 8)).at[:, :, jnp.asarray(experts)].set(beta)}


def test_a_preference_of_zero_changes_no_bit(variables):
    tokens, positions = inputs(CONFIG, LENGTH)
    without = forward(variables, tokens, positions, None)
    np.testing.assert_array_equal(forward(variables, tokens, positions, wanting(0.0)), without)
    assert (forward(variables, tokens, positions, wanting(1.0)) != without).any()


def test_rows_with_different_preferences_equal_each_alone(variables):
    """And a row that wants nothing is the plain model."""
    (tokens, positions), length = inputs(CONFIG, 3 * LENGTH), LENGTH
    tokens, positions = tokens.reshape(3, length), np.repeat(positions[:, :length], 3, axis=0)
    each = [wanting(2.0, (1, 6)), wanting(2.0, (0, 3)), wanting(0.0)]
    together = {"layer_0": jnp.concatenate([x["layer_0"] for x in each], axis=1)}
    batch = forward(variables, tokens, positions, together)
    for i, one in enumerate(each):
        alone = forward(variables, tokens[i : i + 1], positions[i : i + 1], one)
        np.testing.assert_allclose(batch[i : i + 1], alone, atol=1e-5)  # other tiles of rows
    assert np.abs(batch[0] - batch[1]).max() > 1e-3


def test_decoding_heeds_it(variables):
    tokens, positions = inputs(CONFIG, LENGTH)
    preference = wanting(2.0)
    expected = forward(variables, tokens, positions, preference)
    cache, parts = init_state(CONFIG, 1, LENGTH, "float32"), []
    read = jax.jit(
        lambda t, p, c, is_whole: hidden_states(
            MODEL, variables, t, p, c, preference, is_whole=is_whole
        ),
        static_argnums=3,
    )
    for piece in (slice(0, 10), *(slice(i, i + 1) for i in range(10, LENGTH))):
        part, cache = read(tokens[:, piece], positions[:, piece], cache, piece.start == 0)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_load_rises_with_beta_and_gates_of_the_same_choice_stay(scores):
    config = RouterConfig(top_k=2, scores=scores)
    x_TE = jnp.asarray(np.random.RandomState(0).randn(500, 8), jnp.float32)
    wanted_E = np.float32([0, 1, 0, 0, 0, 0, 1, 0])

    @jax.jit
    def preferring(beta):
        return route(
            x_TE, config, preference_E=beta * score_deviation(x_TE, config) * wanted_E[None]
        )

    plain = jax.jit(lambda: route(x_TE, config))()
    load, same = [], 0
    for beta in (0.0, 0.1, 0.3, 1.0, 4.0):
        routing = preferring(np.float32(beta))
        load.append(int(np.asarray(routing.counts_E)[[1, 6]].sum()))
        ids, gates = np.asarray(routing.expert_ids_TK), np.asarray(routing.gates_TK)
        before, old = np.asarray(plain.expert_ids_TK), np.asarray(plain.gates_TK)
        order, old_order = ids.argsort(axis=1), before.argsort(axis=1)
        is_same = (np.sort(ids, axis=1) == np.sort(before, axis=1)).all(axis=1)
        gates = np.take_along_axis(gates, order, axis=1)[is_same]
        np.testing.assert_array_equal(gates, np.take_along_axis(old, old_order, axis=1)[is_same])
        same += is_same.sum()
    assert load == sorted(load)
    assert load[-1] > 2 * load[0]
    assert 500 < same < 2500
