"""Latent attention against every head's keys and values written out, and its absorbed decode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import LatentAttentionConfig
from configs.feed_forward import DenseConfig
from configs.rope import YarnConfig
from model.model_state import init_state
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, inputs, read

LATENT = LatentAttentionConfig(
    num_heads=3,
    query_rank=12,
    latent_rank=10,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=6,
)
LENGTH = 20


def config_of(attention: LatentAttentionConfig):
    """A dense layer before the pattern, as in DeepSeek-V3, and two MoE layers."""
    dense = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=16))
    moe = LayerSpec(attention=attention, ffn=tiny.moe())
    return tiny.model(prefix=(dense,), pattern=(moe,), num_layers=3)


ATTENTIONS = {
    "DeepSeek-V3, biased": dataclasses.replace(LATENT, bias=True),
    "V2-Lite, direct queries": dataclasses.replace(LATENT, query_rank=None),
}


@pytest.fixture(scope="module", params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
def parity(request):
    return Parity(config_of(request.param), LENGTH, tolerance=2e-5)


@pytest.fixture(scope="module")
def latent(parity):
    return parity.config, parity.variables


def test_equals_the_numpy_oracle(parity):
    parity.check()


def test_turning_the_part_without_position_is_told_apart(parity):
    """The mistake that absorption can't survive: RoPE on all of the key."""
    parity.check_told_apart("all turned")


def test_a_bias_past_the_norm_is_told_apart(parity):
    if not parity.config.pattern[0].attention.bias:
        pytest.skip("without a bias it is no mistake")
    parity.check_told_apart("bias past norm")


@pytest.mark.parametrize("prefill", [1, 11])
@pytest.mark.thinned(2)
def test_absorbed_decode_equals_full_forward(latent, prefill):
    check_decode(*latent, LENGTH, prefill)


def test_future_tokens_change_nothing_before_them(latent):
    check_causality(*latent, LENGTH)


def test_the_cache_holds_the_latent_and_one_rotary_key():
    cache = init_state(config_of(LATENT), 1, LENGTH, "float32")
    sizes = [x.size for x in jax.tree.leaves(cache) if x.dtype == jnp.float32]
    assert sum(sizes) == 3 * LENGTH * (10 + 4)


def test_the_configs_count_is_the_models(latent):
    config, _ = latent
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters


def test_yarn_scales_the_logits_of_both_kinds_of_attention(latent):
    """With all keys equal the scale has no effect; with others it has: here by a plain rerun."""
    config, variables = latent
    tokens, positions = inputs(config, LENGTH)
    slow = YarnConfig(factor=4.0, original_length=8)
    changed = config_of(dataclasses.replace(config.pattern[0].attention, rope_scaling=slow))
    plain, _ = read(Transformer(config), variables, tokens, positions)
    stretched, _ = read(Transformer(changed), variables, tokens, positions)
    np.testing.assert_array_equal(plain[:, 0], stretched[:, 0])  # one key: nothing to weigh
    assert np.abs(plain - stretched).max() > 1e-3
