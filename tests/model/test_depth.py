"""Mixture-of-Depths against numpy and the plain block; what it may see; what it saves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MixtureOfDepthsConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from model.depth import num_chosen, with_threshold_selection
from model.model_state import init_state
from model.step import make_step
from model.transformer import (
    Block,
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
)
from tests import oracle, tiny
from tests.probes import check_causality, check_decode, drawn, inputs

LENGTH = 24
HALF = MixtureOfDepthsConfig(capacity=0.5)
DENSE = DenseConfig(d_ff=16)


def config_of(depth: MixtureOfDepthsConfig, ffn=DENSE, **changes):
    """A layer for every token, then one for some, windowed and with sinks."""
    plain = LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=DENSE)
    routed = LayerSpec(attention=tiny.attention(window_size=5), ffn=ffn, depth=depth)
    return tiny.model(pattern=(plain, routed), **changes)


TRAINED = config_of(HALF)
SAMPLED = with_threshold_selection(TRAINED)
VARIABLES = drawn(TRAINED, seed=3)  # of both: selection is no part of the variables


@pytest.mark.parametrize("config", [TRAINED, SAMPLED], ids=["top_capacity", "threshold"])
def test_equals_the_numpy_oracle_on_packed_documents(config):
    """In the numpy form too, the chosen attend among themselves and keep their positions."""
    tokens, positions = inputs(config, LENGTH)
    packed = np.concatenate([positions[:, :15], positions[:, : LENGTH - 15]], axis=1)
    model = Transformer(config)
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, packed))(VARIABLES)
    params = jax.device_get(VARIABLES["params"])
    expected, _ = oracle.transformer(params, config, tokens[0], packed[0])
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)  # float32 through two layers


@pytest.mark.parametrize("config", [TRAINED, SAMPLED], ids=["top_capacity", "threshold"])
def test_blocks_of_queries_find_the_sinks_among_the_chosen(config):
    """Rows long enough that a block's sinks lie before its keys: there a row's place no longer
    tells where its document starts.
    """
    lengths = (2, 90, 60, 8)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)[None]
    tokens = inputs(config, sum(lengths))[0]
    hidden = []
    for name in ("xla", "reference"):
        model = Transformer(config, ExecutionConfig(window_attention=name))
        run = jax.jit(lambda v, model=model: hidden_states(model, v, tokens, positions)[0])
        hidden.append(run(VARIABLES))
    np.testing.assert_allclose(*hidden, atol=1e-5)


def test_whole_capacity_and_an_open_gate_give_the_plain_block():
    spec = dataclasses.replace(TRAINED.pattern[1], depth=dataclasses.replace(HALF, capacity=1.0))
    plain = Block(dataclasses.replace(spec, depth=None), TRAINED, ExecutionConfig())
    x = np.random.RandomState(0).randn(2, LENGTH, 32).astype(np.float32)
    x[:, :, 0] = 3.0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    params = jax.tree.map(lambda p: p[0], VARIABLES["params"]["periods"]["layer_1"])
    open_gate = params | {"depth_router": jnp.zeros(32).at[0].set(20.0)}  # sigmoid(60) = 1
    step = make_step(jnp.zeros_like(positions), jnp.asarray(positions))
    arguments = (jnp.asarray(x), step, None)
    expected = jax.jit(lambda p: plain.apply({"params": p}, *arguments)[0])(params)
    for selection in ("top_capacity", "threshold"):
        depth = dataclasses.replace(spec.depth, selection=selection)
        block = Block(dataclasses.replace(spec, depth=depth), TRAINED, ExecutionConfig())
        run = jax.jit(lambda p, block=block: block.apply({"params": p}, *arguments)[0])
        routed = run(open_gate)
        # The two updates are added to each other first: another rounding.
        np.testing.assert_allclose(routed, expected, atol=2e-6)


def test_the_sampling_rule_sees_no_future():
    check_causality(SAMPLED, VARIABLES, LENGTH)


def test_the_training_rule_does():
    """The wrong rule for sampling: the best of a row depend on what comes later."""
    with pytest.raises(AssertionError):
        check_causality(TRAINED, VARIABLES, LENGTH)


@pytest.mark.parametrize("prefill", [1, 11])
def test_decode_equals_full_forward(prefill):
    check_decode(SAMPLED, VARIABLES, LENGTH, prefill)


def test_the_training_rule_is_refused_with_a_cache():
    tokens, positions = inputs(TRAINED, 4)
    cache = init_state(TRAINED, 1, 4, "float32")
    with pytest.raises(UserError, match=r"model\.depth\.with_threshold_selection gives"):
        hidden_states(Transformer(TRAINED), VARIABLES, tokens, positions, cache)


def test_a_token_that_is_not_chosen_leaves_no_trace():
    """Its cache slot stays empty, and its step branches around the block."""
    tokens, positions = inputs(SAMPLED, LENGTH)
    model, cache = Transformer(SAMPLED), init_state(SAMPLED, 1, LENGTH, "float32", spare=1)
    read = jax.jit(lambda t, p, c: hidden_states(model, VARIABLES, t, p, c))
    for t in range(LENGTH):
        _, cache = read(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
    _, sown = jax.jit(lambda v: hidden_and_router(model, v, tokens, positions))(VARIABLES)
    fraction = sown["router"]["periods"]["layer_1"]["depth"].chosen_fraction[0]
    assert 0.2 < fraction < 0.8
    whole = (
        init_state(TRAINED, 1, LENGTH, "float32", spare=1)
        .periods[1]
        .attention.positions_RS.shape[-1]
    )
    kept = np.asarray(cache.periods[1].attention.positions_RS[0])
    assert (kept >= 0).sum() < min(whole, LENGTH)
    one, two = (
        read.lower(tokens[:, :n], positions[:, :n], cache).as_text().count("stablehlo.case")
        for n in (1, 2)
    )
    assert one == two + 1  # beside those that choose a kernel by the platform


def test_padding_is_chosen_last_and_changes_nothing():
    """Three quarters of the places for half as many tokens: all are chosen, padding adds none."""
    three_quarters = config_of(dataclasses.replace(HALF, capacity=0.75))
    everything = config_of(dataclasses.replace(HALF, capacity=1.0))
    tokens, positions = inputs(TRAINED, LENGTH)
    positions[:, LENGTH // 2 :] = -1
    variables = jax.tree.map(lambda x: x, VARIABLES)
    router = variables["params"]["periods"]["layer_1"]
    router["depth_router"] = jnp.zeros((1, 32)).at[0, 0].set(-1.0)
    model = Transformer(three_quarters)
    padded, sown = jax.jit(lambda v: hidden_and_router(model, v, tokens, positions))(variables)
    short = (tokens[:, : LENGTH // 2], positions[:, : LENGTH // 2])
    alone, _ = jax.jit(lambda v: hidden_states(Transformer(everything), v, *short))(variables)
    np.testing.assert_allclose(padded[:, : LENGTH // 2], alone, atol=1e-5)
    stats = sown["router"]["periods"]["layer_1"]["depth"]
    assert stats.chosen_fraction == pytest.approx(1.0)
    assert np.isfinite(padded).all()


def test_experts_count_the_chosen_only():
    config = tiny.model(pattern=config_of(HALF, ffn=tiny.moe()).pattern[1:], num_layers=1)
    tokens, positions = inputs(config, LENGTH)
    positions[:, 20:] = -1
    for one in (config, with_threshold_selection(config)):
        model, variables = Transformer(one), drawn(config)
        _, sown = jax.jit(lambda v, m=model: hidden_and_router(m, v, tokens, positions))(variables)
        layer = sown["router"]["periods"]["layer_0"]
        chosen = round(float(layer["depth"].chosen_fraction[0]) * 20)
        stats = layer["moe"]["stats"]
        assert 0 < chosen < 20
        assert stats.num_tokens[0] == chosen
        assert stats.counts_E.sum() == 2 * chosen


def test_the_predictors_report_by_hand():
    """Cross-entropy and accuracy of sigmoid(r) against membership, from the layer's own input."""
    tokens, positions = inputs(TRAINED, LENGTH)
    positions[:, 20:] = -1
    routed = tiny.model(pattern=(TRAINED.pattern[1],), num_layers=1)
    variables = drawn(routed)
    run = jax.jit(lambda v: hidden_and_router(Transformer(routed), v, tokens, positions)[1])
    sown = run(variables)
    stats = jax.tree.map(lambda x: x[0], sown["router"]["periods"]["layer_0"]["depth"])
    w = np.asarray(variables["params"]["periods"]["layer_0"]["depth_router"][0], np.float64)
    r = np.asarray(variables["params"]["embedding"], np.float64)[tokens[0, :20]] @ w
    chosen = np.zeros(20)
    chosen[np.argsort(-r)[: LENGTH // 2]] = 1
    p = 1 / (1 + np.exp(-r))
    loss = -(chosen * np.log(p) + (1 - chosen) * np.log(1 - p)).mean()
    assert float(stats.predictor_loss) == pytest.approx(loss, rel=1e-5)
    assert float(stats.predictor_accuracy) == pytest.approx(((p > 0.5) == chosen).mean())
    assert float(stats.chosen_fraction) == pytest.approx(12 / 20)


@pytest.mark.parametrize(
    ("capacity", "length", "count"), [(0.125, 24, 3), (0.07, 100, 7), (1, 5, 5)]
)
def test_capacity_rounds_up(capacity, length, count):
    assert num_chosen(capacity, length) == count


def test_a_block_costs_its_share():
    """Compiled floating-point operations at an eighth of the tokens: attention falls by more than
    that, and choosing adds a little.
    """
    length, flops = 512, []
    attention = tiny.attention(window_size=None, num_sink_tokens=0)
    for depth in (None, MixtureOfDepthsConfig(capacity=0.125)):
        spec = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=256), depth=depth)
        block = Block(spec, TRAINED, ExecutionConfig())
        x = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)
        whole = jax.ShapeDtypeStruct((1, length), jnp.int32)
        step = jax.eval_shape(make_step, whole, whole)
        params = jax.eval_shape(block.init, jax.random.key(0), x, step, None)
        run = jax.jit(lambda p, *a, block=block: block.apply(p, *a, None)[0])
        analysis = run.lower({"params": params["params"]}, x, step).compile()
        flops.append(analysis.cost_analysis()["flops"])
    assert 0.03 < flops[1] / flops[0] < 0.15


def test_the_configs_count_is_the_models():
    abstract, _ = abstract_variables(Transformer(TRAINED))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == TRAINED.num_parameters
    plain = tiny.model(
        pattern=tuple(dataclasses.replace(spec, depth=None) for spec in TRAINED.pattern)
    )
    assert TRAINED.num_parameters == plain.num_parameters + 32
    routed = TRAINED.pattern[1]
    layer = routed.attention.num_parameters(32) + routed.ffn.num_parameters(32) + 2 * 32
    assert TRAINED.num_active_parameters == plain.num_active_parameters - layer // 2 + 32
