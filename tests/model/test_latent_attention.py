"""Latent attention against every head's keys and values written out, and its absorbed decode;
YaRN's frequencies against a table.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import DenseConfig, LatentAttentionConfig, LayerSpec, YarnConfig
from model.cache import init_cache
from model.layers import rope_frequencies
from model.transformer import Transformer, abstract_variables, hidden_states
from tests import oracle, tiny

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


def drawn(model: Transformer):
    random = np.random.RandomState(2)
    abstract, _ = abstract_variables(model)
    return jax.tree.map(
        lambda x: jnp.asarray(random.randn(*x.shape) * x.shape[-1] ** -0.5, jnp.float32), abstract
    )


def inputs():
    tokens = np.random.RandomState(0).randint(0, 300, (1, LENGTH)).astype(np.int32)
    return tokens, np.arange(LENGTH, dtype=np.int32)[None]


ATTENTIONS = {
    "DeepSeek-V3": LATENT,
    "V2-Lite, direct queries": dataclasses.replace(LATENT, query_rank=None),
}


@pytest.fixture(scope="module", params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
def latent(request):
    config = config_of(request.param)
    model = Transformer(config)
    return config, model, drawn(model)


def test_equals_the_numpy_oracle(latent):
    config, model, variables = latent
    tokens, positions = inputs()
    packed = np.concatenate([positions[:, :7], positions[:, : LENGTH - 7]], axis=1)
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, packed))(variables)
    params = jax.device_get(variables["params"])
    expected, _ = oracle.transformer(params, config, tokens[0], packed[0])
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)


def test_turning_the_part_without_position_is_told_apart():
    """The mistake that absorption can't survive: RoPE on all of the key."""
    random = np.random.RandomState(0)
    config = dataclasses.replace(LATENT, query_rank=None)
    shapes = {"kv_down": (32, 14), "kv_up": (10, 3, 14), "q": (32, 3, 12), "o": (3, 6, 32)}
    w = {name: random.randn(*shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    w["kv_norm"] = {"scale": np.ones(10)}
    x, positions, documents = random.randn(9, 32), np.arange(9), np.zeros(9)
    right = oracle.latent_attention(x, w, config, positions, documents)
    wrong = oracle.latent_attention(x, w, config, positions, documents, rope_everything=True)
    assert np.abs(right - wrong).max() > 1e-2


@pytest.mark.parametrize("prefill", [1, 11])
def test_absorbed_decode_equals_full_forward(latent, prefill):
    config, model, variables = latent
    tokens, positions = inputs()
    expected, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    cache = init_cache(config, 1, LENGTH, "float32")
    read = jax.jit(lambda t, p, c: hidden_states(model, variables, t, p, c))
    hidden, cache = read(tokens[:, :prefill], positions[:, :prefill], cache)
    parts = [hidden]
    for i in range(prefill, LENGTH):
        hidden, cache = read(tokens[:, i : i + 1], positions[:, i : i + 1], cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-4)


def test_future_tokens_change_nothing_before_them(latent):
    _, model, variables = latent
    tokens, positions = inputs()
    forward = jax.jit(lambda t: hidden_states(model, variables, t, positions)[0])
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 7) % 300
    before, after = forward(tokens), forward(changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any()


def test_the_cache_holds_the_latent_and_one_rotary_key():
    config = config_of(LATENT)
    cache = init_cache(config, 1, LENGTH, "float32")
    sizes = [x.size for x in jax.tree.leaves(cache) if x.dtype == jnp.float32]
    assert sum(sizes) == 3 * LENGTH * (10 + 4)


def test_the_configs_count_is_the_models(latent):
    config, model, _ = latent
    abstract, _ = abstract_variables(model)
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters


# --- YaRN ---------------------------------------------------------------------------------------

YARN = YarnConfig(factor=40.0, original_length=4096)


def test_yarn_with_factor_one_changes_nothing():
    one = YarnConfig(factor=1.0, original_length=4096)
    assert one.logit_scale == 1.0
    np.testing.assert_array_equal(
        rope_frequencies(64, 10_000.0, one), rope_frequencies(64, 10_000.0, None)
    )


def test_yarn_keeps_the_fastest_and_stretches_the_slowest():
    plain, stretched = rope_frequencies(64, 10_000.0, None), rope_frequencies(64, 10_000.0, YARN)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_array_equal(stretched[turns >= 32], plain[turns >= 32])
    np.testing.assert_allclose(stretched[turns <= 1], plain[turns <= 1] / 40, rtol=1e-6)
    assert (turns >= 32).any()
    assert (turns <= 1).any()
    assert (np.diff(stretched) < 0).all()


def test_yarn_between_the_two_by_hand():
    """base 10^4, width 64, pair 12: theta = 10^-1.5, 20.6 turns in 4096, kept (20.6 - 1) / 31."""
    theta = 10**-1.5
    kept = (4096 * theta / (2 * np.pi) - 1) / 31
    expected = kept * theta + (1 - kept) * theta / 40
    assert rope_frequencies(64, 10_000.0, YARN)[12] == pytest.approx(expected, rel=1e-6)
    assert YARN.logit_scale == pytest.approx((0.1 * np.log(40) + 1) ** 2)


def test_yarn_scales_the_logits_of_both_kinds_of_attention(latent):
    """With all keys equal the scale has no effect; with others it has: here by a plain rerun."""
    config, _, variables = latent
    tokens, positions = inputs()
    slow = YarnConfig(factor=4.0, original_length=8)
    changed = config_of(dataclasses.replace(config.pattern[0].attention, yarn=slow))
    plain, _ = hidden_states(Transformer(config), variables, tokens, positions)
    stretched, _ = hidden_states(Transformer(changed), variables, tokens, positions)
    np.testing.assert_array_equal(plain[:, 0], stretched[:, 0])  # one key: nothing to weigh
    assert np.abs(plain - stretched).max() > 1e-3
