"""Routers that see more than the token: against numpy, causal, cached, and equal to the plain
router where their addition is zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import ContextConfig, DenseConfig, LayerSpec, RouterConfig
from model.cache import init_cache
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
    init_variables,
)
from tests import oracle, tiny

CAUSAL = ContextConfig(kind="causal", window_size=6, num_heads=2, head_dim=8)
CONTEXTS = {"causal": CAUSAL, "correlation": ContextConfig(kind="correlation")}
LENGTH = 24


def config_of(context: ContextConfig | None, **router):
    """Two MoE layers, one windowed; the router may have null experts and a bias as well."""
    ffn = tiny.moe(router=RouterConfig(top_k=3, context=context, **router))
    windowed, everywhere = tiny.attention(), tiny.attention(window_size=None, num_sinks=0)
    pattern = tuple(LayerSpec(attention=a, ffn=ffn) for a in (windowed, everywhere))
    return tiny.model(pattern=pattern)


def drawn(model: Transformer):
    """Random variables: a zero matrix would hide what it multiplies."""
    random = np.random.RandomState(1)
    abstract, _ = abstract_variables(model)
    return jax.tree.map(
        lambda x: jnp.asarray(random.randn(*x.shape) * 32**-0.5, jnp.float32), abstract
    )


def inputs(seed: int = 0):
    tokens = np.random.RandomState(seed).randint(0, 300, (1, LENGTH)).astype(np.int32)
    return tokens, np.arange(LENGTH, dtype=np.int32)[None]


FULL = {"num_null_experts": 2, "target_k": 2.0, "balance": "quantile", "bias_rate": 1.0}


@pytest.fixture(scope="module", params=CONTEXTS.values(), ids=CONTEXTS.keys())
def routed(request):
    config = config_of(request.param, **FULL)
    model = Transformer(config)
    return config, model, drawn(model)


def test_future_tokens_change_nothing_before_them(routed):
    _, model, variables = routed
    tokens, positions = inputs()
    forward = jax.jit(lambda t: hidden_and_router(model, variables, t, positions)[0])
    for t in (0, 7, 19):
        changed = tokens.copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % 300
        np.testing.assert_array_equal(forward(tokens)[:, : t + 1], forward(changed)[:, : t + 1])
    assert (forward(tokens)[:, 20:] != forward(changed)[:, 20:]).any()


@pytest.mark.parametrize("prefill", [1, 9, 23])
def test_decode_equals_full_forward(routed, prefill):
    config, model, variables = routed
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


def test_the_context_router_starts_as_the_plain_one():
    """Bit for bit, with the plain one's weights: its own matrix is zero at first."""
    tokens, positions = inputs()
    hidden, plain = [], {}
    for context in (None, CAUSAL):
        model = Transformer(config_of(context))
        variables = jax.jit(lambda model=model: init_variables(model, 0))()
        if context is None:
            plain = variables["params"]
        else:
            first = variables["params"]["periods"]["layer_0"]["moe"]["context"]
            assert not np.asarray(first["o"]).any()
            assert np.asarray(first["q"]).any()
            variables["params"] = _with(variables["params"], plain)
        hidden.append(hidden_states(model, variables, tokens, positions)[0])
    np.testing.assert_array_equal(hidden[0], hidden[1])


def _with(params, plain):
    """The plain model's weights where both have them."""
    return {
        name: _with(part, plain[name])
        if isinstance(part, dict) and name in plain
        else plain.get(name, part)
        for name, part in params.items()
    }


def test_the_causal_router_equals_the_oracle():
    """One MoE layer after one dense one; attention as in tests/oracle.py, its result added."""
    dense = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16))
    moe = LayerSpec(
        attention=tiny.attention(), ffn=tiny.moe(router=RouterConfig(top_k=2, context=CAUSAL))
    )
    config = tiny.model(pattern=(dense, moe))
    model = Transformer(config)
    variables = drawn(model)
    tokens, positions = inputs()
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    expected, _ = oracle.transformer(
        jax.device_get(variables["params"]), config, tokens[0], positions[0]
    )
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)


def test_the_correlation_router_equals_the_oracle():
    ffn = tiny.moe(router=RouterConfig(top_k=2, context=CONTEXTS["correlation"]))
    config = tiny.model(pattern=(LayerSpec(attention=tiny.attention(), ffn=ffn),))
    model = Transformer(config)
    variables = drawn(model)
    tokens, positions = inputs()
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    expected, _ = oracle.transformer(
        jax.device_get(variables["params"]), config, tokens[0], positions[0]
    )
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_the_configs_count_is_the_models(context):
    config = config_of(context, **FULL)
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters
