"""Grouped-query attention with a learned sink logit per head: numpy, decode, and off is off."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig
from model.transformer import Transformer, abstract_variables, init_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_decode

LOCAL = tiny.attention(sink_logits=True)
EVERYWHERE = tiny.attention(window_size=None, num_sink_tokens=0, sink_logits=True)
CONFIG = tiny.model(
    pattern=tuple(LayerSpec(attention=a, ffn=DenseConfig(d_ff=16)) for a in (LOCAL, EVERYWHERE))
)
LENGTH = 30


@pytest.fixture(scope="module")
def parity():
    """Sinks of order 1, so that they take a share worth seeing."""
    return Parity(CONFIG, LENGTH, tolerance=2e-5)


@pytest.fixture(scope="module")
def variables(parity):
    return parity.variables


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize("wrong", ["sink of the group", "sink with a value"])
def test_wrong_sinks_are_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


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
