"""Growth: the grown model is the same function, and operators that only look right are not."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from model.growth import grow, grown_config
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
    output_weights,
    training_pass,
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
CASES = [(*case, 2) for case in CASES]
CASES += [("Mixtral", "split", 4), ("softmax with bias", "reserve", 3)]
CASES += [("sigmoid, not renormalised", "copy", 4)]
COPIED = ("Mixtral", "one to three, context")
"""Whose copies are tried in the fast tests: splitting moves all that copying does, and more."""
TOKENS = np.random.RandomState(0).randint(0, 300, (2, 24)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))


TOLERANCE = 2e-5  # float32 sums in another order


def config_of(router: RouterConfig, **ffn):
    windowed, dense = tiny.model().pattern
    moe = tiny.moe(router=router, **ffn)
    return tiny.model(pattern=(dataclasses.replace(windowed, ffn=moe), dense))


GPT_OSS = config_of(
    RouterConfig(top_k=2, bias=True, **BIAS),
    bias=True,
    activation="clamped_swiglu",
    swiglu_limit=0.7,
    swiglu_alpha=1.702,
)


@partial(jax.jit, static_argnums=0)
def log_probabilities(config, variables):
    model = Transformer(config)
    hidden, _ = hidden_states(model, variables, TOKENS, POSITIONS)
    return jax.nn.log_softmax(hidden @ output_weights(model, variables), axis=-1)


def divergence(before, after) -> float:
    """Mean KL(before || after) in nats."""
    return float((jnp.exp(before) * (before - after)).sum(axis=-1).mean())


@pytest.mark.parametrize(
    ("name", "operator", "factor"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        if case[1] == "copy" and case[0] not in COPIED
        else case
        for case in CASES
    ],
)
@pytest.mark.thinned(4)
def test_the_grown_model_is_the_same_function(name, operator, factor):
    config = config_of(ROUTERS[name])
    variables, grown = drawn(config), grown_config(config, operator, factor)
    after = grow(variables, config, operator, factor)
    abstract, _ = abstract_variables(Transformer(grown))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, abstract)
    before_BLV, after_BLV = log_probabilities(config, variables), log_probabilities(grown, after)
    np.testing.assert_allclose(after_BLV, before_BLV, atol=TOLERANCE)
    assert divergence(before_BLV, after_BLV) < 1e-6


@pytest.mark.parametrize("operator", ["split", pytest.param("copy", marks=pytest.mark.slow)])
def test_a_gate_on_shared_experts_stays(operator):
    config = config_of(ROUTERS["Mixtral"], shared_gate=True)
    variables, grown = drawn(config), grown_config(config, operator, 2)
    after = grow(variables, config, operator, 2)
    before_BLV, after_BLV = log_probabilities(config, variables), log_probabilities(grown, after)
    np.testing.assert_allclose(after_BLV, before_BLV, atol=TOLERANCE)


CASES_OF_COPIES = (("copy", 2), ("reserve", 3))


@pytest.mark.parametrize(
    ("operator", "factor"),
    [("split", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES_OF_COPIES)],
)
def test_biases_grow_too(operator, factor):
    """Whole in each part of a split expert, they would count as often as there are parts."""
    variables, grown = drawn(GPT_OSS), grown_config(GPT_OSS, operator, factor)
    after = grow(variables, GPT_OSS, operator, factor)
    abstract, _ = abstract_variables(Transformer(grown))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, abstract)
    before_BLV, after_BLV = log_probabilities(GPT_OSS, variables), log_probabilities(grown, after)
    np.testing.assert_allclose(after_BLV, before_BLV, atol=TOLERANCE)
    if operator == "split":
        moe = after["params"]["periods"]["layer_0"]["moe"]
        moe["down_bias"] = factor * moe["down_bias"]
        assert np.abs(log_probabilities(grown, after) - before_BLV).max() > 50 * TOLERANCE


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
    _, sown = jax.jit(partial(hidden_and_router, model))(after, TOKENS, POSITIONS)
    counts = sown["router"]["periods"]["layer_0"]["moe"]["stats"].counts_E[0]
    assert counts[8:].sum() == 0
    assert counts[:8].sum() == TOKENS.size * 2


@pytest.mark.parametrize(
    "operator", [pytest.param("copy", marks=pytest.mark.slow), "reserve", "split"]
)
@pytest.mark.slow
def test_multi_token_modules_grow_too(operator):
    """Their experts lie unstacked; what they predict stays the same."""
    layer = config_of(ROUTERS["DeepSeek-V3 without groups"]).pattern[0]
    config = tiny.model(
        pattern=(layer,), num_layers=1, multi_token=MultiTokenConfig(depth=1, layer=layer)
    )
    grown = grown_config(config, operator, 2, warmup_steps=5 if operator == "reserve" else None)
    steps = 5 if operator == "reserve" else None
    variables = drawn(config)
    after = grow(variables, config, operator, warmup_steps=steps)
    abstract, _ = abstract_variables(Transformer(grown))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (after, abstract))
    assert shapes[0] == shapes[1]
    sown = [
        jax.jit(lambda v, c=c: training_pass(Transformer(c), v, TOKENS, POSITIONS)[1])(v)
        for c, v in ((config, variables), (grown, after))
    ]
    before, now = (x["multi_token"]["hidden_0"][0] for x in sown)
    np.testing.assert_allclose(now, before, atol=TOLERANCE)
    if operator == "reserve":
        assert sown[1]["router"]["multi_token_0"]["layer"]["moe"]["stats"].counts_E[8:].sum() == 0


@pytest.mark.slow
def test_dropped_units_lose_their_biases():
    """The same units of gate, up and their biases; biases of the output stay."""
    variables = drawn(GPT_OSS)
    after = grow(variables, GPT_OSS, "reserve", drop=0.5)
    before, moe = (x["params"]["periods"]["layer_0"]["moe"] for x in (variables, after))
    names = ("gate_up", "gate_up_bias", "down_bias")
    kept = {name: np.concatenate([before[name]] * 2, axis=1) for name in names}
    lost_EF = (moe["gate_up"] != kept["gate_up"])[0, :, :, 0].any(axis=1)
    changed_E2F = np.asarray(moe["gate_up_bias"] != kept["gate_up_bias"])[0]
    for changed_EF in (changed_E2F[:, 0], changed_E2F[:, 1]):
        np.testing.assert_array_equal(changed_EF, lost_EF)
    np.testing.assert_array_equal(moe["down_bias"], kept["down_bias"])


@pytest.mark.slow
def test_dropped_units_are_one_set_for_all_three_matrices():
    """Half of each twin's units, drawn with the deviation of what was there; parents keep theirs,
    and under reserve the function is the same."""
    config = config_of(ROUTERS["softmax with bias"])
    variables, grown = drawn(config), grown_config(config, "reserve", 3)
    plain = grow(variables, config, "reserve", 3)
    after = grow(variables, config, "reserve", 3, drop=0.5, seed=4)
    moe, kept = (x["params"]["periods"]["layer_0"]["moe"] for x in (after, plain))
    changed = {
        "gate": (moe["gate_up"] != kept["gate_up"])[0, :, :, 0].any(axis=1),
        "up": (moe["gate_up"] != kept["gate_up"])[0, :, :, 1].any(axis=1),
        "down": (moe["down"] != kept["down"])[0].any(axis=2),
    }
    for lost_EF in changed.values():
        np.testing.assert_array_equal(lost_EF, changed["gate"])  # drawing one set each would fail
    assert (changed["gate"].sum(axis=1)[8:] == 8).all()
    assert not changed["gate"][:8].any()
    sets = {tuple(np.flatnonzero(row)) for row in np.asarray(changed["gate"])[8:]}
    assert len(sets) > 8  # each expert has its own
    lost = np.asarray(changed["down"])[8:]
    new, old = (np.asarray(x["down"])[0, 8:][lost] for x in (moe, kept))
    assert new.std() == pytest.approx(old.std(), rel=0.05)
    before_BLV, after_BLV = log_probabilities(config, variables), log_probabilities(grown, after)
    np.testing.assert_allclose(after_BLV, before_BLV, atol=TOLERANCE)
    with pytest.raises(UserError, match="experts that are split have no copies"):
        grow(variables, config, "split", drop=0.5)


@pytest.mark.parametrize("factor", [1, 0, 2.5, 2.0])
def test_a_factor_that_is_no_integer_above_one_is_refused(factor):
    with pytest.raises(UserError, match=f"a factor of {factor}"):
        grown_config(config_of(ROUTERS["Mixtral"]), "copy", factor)


def test_a_warm_up_goes_with_reserve():
    with pytest.raises(UserError, match="warmup_steps=9 goes with growth by 'reserve'"):
        grown_config(config_of(ROUTERS["Mixtral"]), "copy", 2, warmup_steps=9)
    config = config_of(ROUTERS["softmax with bias"])
    once = grown_config(config, "reserve", 2, warmup_steps=9)
    variables = grow(drawn(config), config, "reserve", warmup_steps=9)
    twice = grow(variables, once, "copy")  # of a model that has warmed up
    abstract, _ = abstract_variables(Transformer(grown_config(once, "copy")))
    assert jax.tree.map(jnp.shape, twice) == jax.tree.map(jnp.shape, abstract)


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
    with pytest.raises(UserError, match="d_ff divisible by 2, got 15"):
        grown_config(tiny.model(pattern=(odd,)), "split")
