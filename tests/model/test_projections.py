"""Grouped-query attention with biases, normed and bounded queries and keys, and dense layers with
biases: against numpy, through the cache, and on a mesh.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig
from model.transformer import Transformer, abstract_variables, init_variables
from tests import tiny
from tests.probes import Parity, check_decode, check_devices

EVERYWHERE = tiny.attention(window_size=None, num_sink_tokens=0)
OLMOE = dataclasses.replace(EVERYWHERE, qk_norm="all", clip_qkv=0.4)
LAYERS = {
    "gpt-oss": tiny.attention(bias=True, sink_logits=True),
    "Qwen3": dataclasses.replace(EVERYWHERE, qk_norm="head"),
    "OLMoE": OLMOE,
    "everything": tiny.attention(bias=True, qk_norm="head", clip_qkv=0.5, sink_logits=True),
}
CONFIG = tiny.model(
    num_layers=4,
    pattern=tuple(
        LayerSpec(attention=a, ffn=DenseConfig(d_ff=16, bias=a.bias)) for a in LAYERS.values()
    ),
)
LENGTH = 26


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


@pytest.fixture(scope="module")
def variables(parity):
    return parity.variables


def test_equals_the_numpy_oracle(parity):
    parity.check()


def with_olmoe(attention):
    """The model with another attention in the place of OLMoE's."""
    *before, olmoe, last = CONFIG.pattern
    other = dataclasses.replace(olmoe, attention=attention)
    return dataclasses.replace(CONFIG, pattern=(*before, other, last))


@pytest.mark.parametrize(
    "wrong",
    [
        "clipped before the norm",
        with_olmoe(dataclasses.replace(OLMOE, clip_qkv=None)),
        with_olmoe(dataclasses.replace(OLMOE, qk_norm="head")),
    ],
    ids=["clipped before the norm", "not clipped", "normed by head"],
)
def test_wrong_norms_and_bounds_are_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


@pytest.mark.slow
def test_decode_equals_full_forward(variables):
    check_decode(CONFIG, variables, LENGTH, 15)


@pytest.mark.slow
def test_heads_over_two_devices_give_the_same(variables):
    """The norm of all heads together reads what both devices hold; biases count once."""
    check_devices(CONFIG, variables, LENGTH, (2, 1, 2), tolerance=2e-5)


def test_shapes_starts_and_counts():
    abstract, axes = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters
    layers, names = abstract["params"]["periods"], axes["params"]["periods"]
    shapes = jax.tree.map(lambda x: x.shape[1:], layers)
    biased, by_head, together = (shapes[f"layer_{i}"]["attention"] for i in range(3))
    assert biased["q_bias"] == (4, 8)
    assert biased["kv_bias"] == (2, 2, 8)
    assert biased["o_bias"] == (32,)
    assert by_head["q_norm"]["scale"] == by_head["k_norm"]["scale"] == (8,)
    assert together["q_norm"]["scale"] == (4, 8)
    assert together["k_norm"]["scale"] == (2, 8)
    assert shapes["layer_0"]["ffn"]["gate_up_bias"] == (2, 16)
    assert shapes["layer_0"]["ffn"]["down_bias"] == (32,)
    assert "down_bias" not in shapes["layer_1"]["ffn"]
    ffn = names["layer_0"]["ffn"]
    assert ffn["gate_up_bias"] == ("layers", None, "mlp")
    assert ffn["down_bias"] == ("layers", "embed")
    together = names["layer_2"]["attention"]
    assert together["q_norm"]["scale"] == ("layers", "heads", "head_dim")
    assert together["k_norm"]["scale"] == ("layers", "kv_heads", "head_dim")
    start = jax.jit(lambda: init_variables(Transformer(CONFIG), 0)["params"])()
    biases = start["periods"]["layer_0"]["attention"]
    assert all((biases[name] == 0).all() for name in ("q_bias", "kv_bias", "o_bias"))
    scale = start["periods"]["layer_1"]["attention"]["q_norm"]["scale"]
    np.testing.assert_array_equal(scale, np.ones((1, 8)))
