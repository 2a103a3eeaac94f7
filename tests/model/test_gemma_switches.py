"""What Gemma, Llama 4 and Ministral 3 change in a layer: norms centered on zero, scores and logits
with a bound, GELU, queries that grow, chunks, values of the keys' projection; against numpy,
through the cache, and on a mesh.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import QueryTemperatureConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, RouterConfig
from infer.logits import full_logits
from model.transformer import Transformer, abstract_variables
from tests import oracle, tiny
from tests.probes import Parity, check_causality, check_decode, check_devices, inputs

LOCAL = tiny.attention(
    num_sink_tokens=1,
    qk_norm="head",
    zero_centered_qk_norm=True,
    score_cap=0.8,
    score_scale=0.9,
)
EVERYWHERE = tiny.attention(window_size=None, num_sink_tokens=0)
CHUNKED = dataclasses.replace(
    EVERYWHERE, chunk_size=5, qk_norm="head_unscaled", qk_norm_after_rope=True
)
WARM = QueryTemperatureConfig(growth=0.5, length=4, counts_itself=True)
GLOBAL = dataclasses.replace(
    EVERYWHERE,
    rotary_dim=4,
    rotary_pairs="across",
    value_norm=True,
    values_from_keys=True,
    query_temperature=WARM,
)
INPUTS = RouterConfig(top_k=2, scores="sigmoid", normalize_gates=False, gates_on="inputs")
SCALED = RouterConfig(top_k=2, expert_scales=True, input_norm=True)
GEGLU = DenseConfig(d_ff=16, activation="geglu")
CONFIG = tiny.model(
    num_layers=3,
    pattern=(
        LayerSpec(attention=LOCAL, ffn=GEGLU, norms="sandwich"),
        LayerSpec(attention=CHUNKED, ffn=tiny.moe(router=INPUTS)),
        LayerSpec(
            attention=GLOBAL,
            ffn=tiny.moe(router=SCALED, activation="geglu"),
            norms="sandwich",
            dense=GEGLU,
            output_scale=True,
        ),
    ),
    zero_centered_norms=True,
    logit_cap=0.5,
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=1e-4)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def test_logits_keep_within_their_bound(parity):
    tokens, positions = inputs(CONFIG, LENGTH)
    params = jax.device_get(parity.variables["params"])
    found = full_logits(Transformer(CONFIG), parity.variables, tokens[0].tolist())
    _, expected = oracle.transformer(params, CONFIG, tokens[0], positions[0])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    open_ended = dataclasses.replace(CONFIG, logit_cap=None)
    _, unbounded = oracle.transformer(params, open_ended, tokens[0], positions[0])
    assert np.abs(unbounded).max() > 2 * np.abs(found).max()


def changed(number: int, what: str = "attention", **changes):
    """The model with another setting of one layer's attention or feed-forward."""
    pattern = list(CONFIG.pattern)
    part = dataclasses.replace(getattr(pattern[number], what), **changes)
    pattern[number] = dataclasses.replace(pattern[number], **{what: part})
    return dataclasses.replace(CONFIG, pattern=tuple(pattern))


WRONG = {
    "plain norms": dataclasses.replace(CONFIG, zero_centered_norms=False),
    "plain norm of heads": changed(0, zero_centered_qk_norm=False),
    "no bound": changed(0, score_cap=None),
    "silu": changed(0, "ffn", activation="swiglu"),
    "silu in experts": changed(2, "ffn", activation="swiglu"),
    "gates on results": changed(1, "ffn", router=dataclasses.replace(INPUTS, gates_on="outputs")),
    "experts alike": changed(2, "ffn", router=dataclasses.replace(SCALED, expert_scales=False)),
    "router reads the experts' norm": changed(
        2, "ffn", router=dataclasses.replace(SCALED, input_norm=False)
    ),
    "silu beside": changed(2, "dense", activation="swiglu"),
    "all before": changed(1, chunk_size=None),
    "a window": changed(1, chunk_size=None, window_size=5),
    "no norm of heads": changed(1, qk_norm=None, qk_norm_after_rope=False),
    "the first entries": changed(2, rotary_pairs="within"),
    "plain values": changed(2, value_norm=False),
    "steady queries": changed(2, query_temperature=None),
    "counted from 0": changed(2, query_temperature=dataclasses.replace(WARM, counts_itself=False)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_switch_counts(parity, wrong):
    parity.check_told_apart(WRONG[wrong])


def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


@pytest.mark.slow
def test_nothing_sees_the_future(parity):
    check_causality(CONFIG, parity.variables, LENGTH)


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 1, 2), (1, 4, 1)])
@pytest.mark.slow
def test_devices_give_the_same(parity, shape):
    """Data, expert and tensor axes of the mesh; measured 1.8e-5, of hidden states up to 9."""
    check_devices(CONFIG, parity.variables, LENGTH, shape, tolerance=5e-5)


def test_weights_are_counted():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: tiny.attention(zero_centered_qk_norm=True), "no effect with qk_norm=None"),
        (
            lambda: tiny.attention(zero_centered_qk_norm=True, qk_norm="head_unscaled"),
            "no effect with qk_norm='head_unscaled'",
        ),
        (lambda: tiny.attention(score_cap=0.0), "score_cap=0.0 must be greater than 0"),
        (lambda: tiny.model(logit_cap=-1.0), "logit_cap=-1.0 must be greater than 0"),
        (lambda: tiny.attention(chunk_size=4), "chunk_size=4 and window_size=12"),
        (
            lambda: tiny.attention(chunk_size=0, window_size=None, num_sink_tokens=0),
            "chunk_size=0 must be at least 1",
        ),
        (lambda: tiny.attention(rotary_pairs="across"), "no effect with rotary_dim=None"),
        (lambda: tiny.attention(values_from_keys=True, bias=True), "not built with bias=True"),
        (
            lambda: LayerSpec(attention=CHUNKED, ffn=GEGLU, norms="sandwich", dense=GEGLU),
            "dense goes with experts and norms='sandwich', got ffn.kind='dense'",
        ),
        (lambda: QueryTemperatureConfig(growth=0.0, length=4), "growth"),
    ],
)
def test_what_would_be_ignored_is_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
