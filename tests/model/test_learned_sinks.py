"""Grouped-query attention with a learned sink logit per head: numpy, decode, and off is off."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig
from model.transformer import Transformer, abstract_variables, hidden_states, init_variables
from tests import oracle, tiny
from tests.probes import check_causality, check_decode, drawn, inputs

LOCAL = tiny.attention(sink_logits=True)
EVERYWHERE = tiny.attention(window_size=None, num_sink_tokens=0, sink_logits=True)
CONFIG = tiny.model(
    pattern=tuple(LayerSpec(attention=a, ffn=DenseConfig(d_ff=16)) for a in (LOCAL, EVERYWHERE))
)
LENGTH = 30


@pytest.fixture(scope="module")
def variables():
    """Sinks of order 1, so that they take a share worth seeing."""
    return drawn(CONFIG)


def test_equals_the_numpy_oracle(variables):
    model, (tokens, positions) = Transformer(CONFIG), inputs(CONFIG, LENGTH)
    packed = np.concatenate([positions[:, :7], positions[:, : LENGTH - 7]], axis=1)
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, packed))(variables)
    params = jax.device_get(variables["params"])
    expected, _ = oracle.transformer(params, CONFIG, tokens[0], packed[0])
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)  # float32 through two layers


@pytest.mark.parametrize("wrong", ["of the group", "with a value"])
def test_wrong_sinks_are_told_apart(variables, wrong):
    layer = jax.device_get(variables["params"])["periods"]["layer_0"]["attention"]
    w = {name: np.asarray(x[0], np.float64) for name, x in layer.items()}
    x, positions, documents = np.random.RandomState(0).randn(9, 32), np.arange(9), np.zeros(9)
    right = oracle.attention(x, w, LOCAL, positions, documents)
    other = oracle.attention(x, w, LOCAL, positions, documents, wrong_sink=wrong)
    assert np.abs(right - other).max() > 1e-2


@pytest.mark.parametrize("prefill", [1, 15])
def test_decode_equals_full_forward(variables, prefill):
    check_decode(CONFIG, variables, LENGTH, prefill)


def test_future_tokens_change_nothing_before_them(variables):
    check_causality(CONFIG, variables, LENGTH)


def test_sinks_start_at_zero_and_are_counted():
    model = Transformer(CONFIG)
    abstract, axes = abstract_variables(model)
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters
    without = dataclasses.replace(LOCAL, sink_logits=False)
    assert LOCAL.num_parameters(32) == without.num_parameters(32) + 4
    assert axes["params"]["periods"]["layer_0"]["attention"]["sink_logits"] == ("layers", "heads")
    start = jax.jit(lambda: init_variables(model, 0)["params"]["periods"]["layer_0"]["attention"])()
    np.testing.assert_array_equal(start["sink_logits"], np.zeros((1, 4)))
