"""Routers that see more than the token: against numpy, causal, cached, and equal to the plain
router where their addition is zero.
"""

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from model.transformer import Transformer, abstract_variables, hidden_states, init_variables
from tests import oracle, tiny
from tests.probes import check_causality, check_decode, drawn, inputs

CAUSAL = ContextConfig(kind="causal", window_size=6, num_heads=2, head_dim=8)
CONTEXTS = {"causal": CAUSAL, "correlation": ContextConfig(kind="correlation")}
LENGTH = 24


def config_of(context: ContextConfig | None, **router):
    """Two MoE layers, one windowed; the router may have null experts and a bias as well."""
    ffn = tiny.moe(router=RouterConfig(top_k=3, context=context, **router))
    windowed, everywhere = tiny.attention(), tiny.attention(window_size=None, num_sink_tokens=0)
    pattern = tuple(LayerSpec(attention=a, ffn=ffn) for a in (windowed, everywhere))
    return tiny.model(pattern=pattern)


FULL = {"num_null_experts": 2, "target_k": 2.0, "balance": "quantile", "bias_rate": 1.0}


@pytest.fixture(params=CONTEXTS.values(), ids=CONTEXTS.keys())
def config(request):
    return config_of(request.param, **FULL)


def test_future_tokens_change_nothing_before_them(config):
    check_causality(config, drawn(config), LENGTH)


@pytest.mark.parametrize("prefill", [1, 9, 23])
@pytest.mark.thinned(2)
def test_decode_equals_full_forward(config, prefill):
    check_decode(config, drawn(config), LENGTH, prefill)


@pytest.mark.slow
def test_the_context_router_starts_as_the_plain_one():
    """Bit for bit, with the plain one's weights: its own matrix is zero at first."""
    tokens, positions = inputs(config_of(None), LENGTH)
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
        read = jax.jit(lambda v, model=model: hidden_states(model, v, tokens, positions)[0])
        hidden.append(read(variables))
    np.testing.assert_array_equal(hidden[0], hidden[1])


def _with(params, plain):
    """The plain model's weights where both have them."""
    return {
        name: _with(part, plain[name])
        if isinstance(part, dict) and name in plain
        else plain.get(name, part)
        for name, part in params.items()
    }


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_equals_the_oracle(context):
    """One MoE layer after one dense one."""
    dense = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16))
    ffn = tiny.moe(router=RouterConfig(top_k=2, context=context))
    config = tiny.model(pattern=(dense, LayerSpec(attention=tiny.attention(), ffn=ffn)))
    variables, (tokens, positions) = drawn(config), inputs(config, LENGTH)
    model = Transformer(config)
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    params = jax.device_get(variables["params"])
    expected, _ = oracle.transformer(params, config, tokens[0], positions[0])
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_the_configs_count_is_the_models(context):
    config = config_of(context, **FULL)
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters
