"""Growth: the grown model is the same function, and operators that only look right are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import ContextConfig, DenseConfig, LayerSpec, RouterConfig
from configs.checks import UserError
from model.growth import grow, grown_config
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
    output_weights,
)
from tests import tiny
from tests.probes import drawn

BIAS = {"balance": "loss_free", "bias_rate": 1e-3}
ROUTERS = {
    "Mixtral": RouterConfig(top_k=2),
    "OLMoE": RouterConfig(top_k=2, normalize_gates=False),
    "DeepSeek-V3 without groups": RouterConfig(top_k=2, scores="sigmoid", gate_scale=2.5, **BIAS),
    "sigmoid, not renormalised": RouterConfig(
        top_k=2, scores="sigmoid", normalize_gates=False, **BIAS
    ),
    "one to three, context": RouterConfig(
        top_k=3,
        num_null_experts=2,
        target_k=2.0,
        context=ContextConfig(kind="causal", window_size=6, num_heads=2, head_dim=8),
    ),
    "softmax with bias": RouterConfig(top_k=2, **BIAS),
    "correlation": RouterConfig(top_k=2, context=ContextConfig(kind="correlation")),
}
RESERVABLE = ("softmax with bias", "DeepSeek-V3 without groups", "sigmoid, not renormalised")
CASES = [(name, operator) for name in ROUTERS for operator in ("copy", "split")]
CASES += [(name, "reserve") for name in RESERVABLE]
TOKENS = np.random.RandomState(0).randint(0, 300, (2, 24)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))


TOLERANCE = 2e-5  # float32 sums in another order


def config_of(router: RouterConfig):
    windowed, dense = tiny.model().pattern
    return tiny.model(pattern=(dataclasses.replace(windowed, ffn=tiny.moe(router=router)), dense))


def log_probabilities(config, variables):
    model = Transformer(config)
    hidden, _ = hidden_states(model, variables, TOKENS, POSITIONS)
    return jax.nn.log_softmax(hidden @ output_weights(model, variables), axis=-1)


def divergence(before, after) -> float:
    """Mean KL(before || after) in nats."""
    return float((jnp.exp(before) * (before - after)).sum(axis=-1).mean())


@pytest.mark.parametrize(("name", "operator"), CASES)
def test_the_grown_model_is_the_same_function(name, operator):
    config = config_of(ROUTERS[name])
    variables, grown = drawn(config), grown_config(config, operator)
    after = grow(variables, config, operator)
    abstract, _ = abstract_variables(Transformer(grown))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, abstract)
    before_BLV, after_BLV = log_probabilities(config, variables), log_probabilities(grown, after)
    np.testing.assert_allclose(after_BLV, before_BLV, atol=TOLERANCE)
    assert divergence(before_BLV, after_BLV) < 1e-6


def test_copies_with_the_same_top_k_are_another_function():
    """The plausible mistake: the best expert and its twin are chosen, the second best is lost."""
    config = config_of(ROUTERS["Mixtral"])
    variables, grown = drawn(config), grown_config(config, "copy")
    wrong = grown.pattern[0].ffn
    wrong = dataclasses.replace(wrong, router=dataclasses.replace(wrong.router, top_k=2))
    pattern = (dataclasses.replace(grown.pattern[0], ffn=wrong), grown.pattern[1])
    after = grow(variables, config, "copy")
    wrong_BLV = log_probabilities(dataclasses.replace(grown, pattern=pattern), after)
    error = np.abs(log_probabilities(config, variables) - wrong_BLV).max()
    assert error > 50 * TOLERANCE


def test_no_token_reaches_a_reserved_twin():
    config = config_of(ROUTERS["DeepSeek-V3 without groups"])
    after = grow(drawn(config), config, "reserve")
    model = Transformer(grown_config(config, "reserve"))
    _, sown = hidden_and_router(model, after, jnp.asarray(TOKENS), jnp.asarray(POSITIONS))
    counts = sown["router"]["periods"]["layer_0"]["moe"]["stats"].counts_E[0]
    assert counts[8:].sum() == 0
    assert counts[:8].sum() == TOKENS.size * 2


def test_compute_and_parameters_are_what_the_operator_says():
    config = config_of(ROUTERS["Mixtral"])
    experts = 3 * 32 * 16
    copied, halved = (grown_config(config, operator) for operator in ("copy", "split"))
    router = 32 * 8
    assert copied.num_parameters - config.num_parameters == 8 * experts + router
    assert copied.num_active_parameters - config.num_active_parameters == 2 * experts + router
    assert halved.num_parameters - config.num_parameters == router
    assert halved.num_active_parameters - config.num_active_parameters == router


def test_what_cannot_grow_exactly_is_refused():
    dense = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=8))
    with pytest.raises(UserError, match="this model has none"):
        grown_config(tiny.model(pattern=(dense,)), "copy")
    with pytest.raises(UserError, match="needs a router with a bias"):
        grown_config(config_of(ROUTERS["Mixtral"]), "reserve")
    grouped = RouterConfig(top_k=2, num_groups=4, top_groups=2)
    with pytest.raises(UserError, match="num_groups=4"):
        grown_config(config_of(grouped), "copy")
    soft = RouterConfig(top_k=2, normalize_gates=False, **BIAS)
    with pytest.raises(UserError, match="double the denominator"):
        grown_config(config_of(soft), "reserve")
    odd = tiny.model().pattern[0]
    odd = dataclasses.replace(odd, ffn=tiny.moe(d_ff=15))
    with pytest.raises(UserError, match="even d_ff, got 15"):
        grown_config(tiny.model(pattern=(odd,)), "split")
