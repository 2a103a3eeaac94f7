"""What families on delta nets change in a layer: a gate on attention's result (Qwen3-Next), latent
attention without positions (Kimi Linear), corrections of up to twice (OLMo Hybrid); against numpy
and through the cache.
"""

import dataclasses

import jax
import pytest

from configs.architecture import LayerSpec
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_decode

GATED = tiny.attention(
    window_size=None, num_sink_tokens=0, rotary_dim=4, bias=True, output_gate=True
)
NOPE = LatentAttentionConfig(
    num_heads=3,
    query_rank=None,
    latent_rank=10,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=6,
    has_rope=False,
)
DELTA = GatedDeltaConfig(
    num_heads=4, num_key_heads=2, key_head_dim=6, value_head_dim=8, doubled_beta=True, norm_eps=1e-2
)
DENSE = DenseConfig(d_ff=16)
CONFIG = tiny.model(
    num_layers=3,
    pattern=tuple(LayerSpec(attention=each, ffn=DENSE) for each in (GATED, NOPE, DELTA)),
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    """3.6e-6 was measured."""
    return Parity(CONFIG, LENGTH, tolerance=1e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def with_attention(number: int, attention):
    """The model with another attention in one place."""
    pattern = list(CONFIG.pattern)
    pattern[number] = dataclasses.replace(pattern[number], attention=attention)
    return dataclasses.replace(CONFIG, pattern=tuple(pattern))


WRONG = {
    "no gate": with_attention(0, dataclasses.replace(GATED, output_gate=False)),
    "gate without a sigmoid": "gate without a sigmoid",
    "positions": with_attention(1, dataclasses.replace(NOPE, has_rope=True)),
    "the model's eps": with_attention(2, dataclasses.replace(DELTA, norm_eps=None)),
    "beta up to 1": with_attention(2, dataclasses.replace(DELTA, doubled_beta=False)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_switch_counts(parity, wrong):
    if wrong == "gate without a sigmoid":
        gated = tiny.model(num_layers=1, pattern=CONFIG.pattern[:1])
        Parity(gated, LENGTH, tolerance=1e-5).check_told_apart(wrong)
    else:
        parity.check_told_apart(WRONG[wrong])


def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


def test_parameters_are_counted():
    variables, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == CONFIG.num_parameters


def test_positions_that_would_be_ignored_are_refused():
    with pytest.raises(UserError, match="has_rope=False turns nothing"):
        dataclasses.replace(NOPE, rope_base=5e5)
