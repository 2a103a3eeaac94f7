"""Layers that read the keys of an earlier one, and embeddings for each layer: against numpy,
through the cache, on a mesh, scanned and by themselves; what they keep and what they don't go with.
"""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import (
    EarlyExitConfig,
    HyperConnectionConfig,
    LayerSpec,
    MixtureOfDepthsConfig,
    MultiTokenConfig,
)
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from infer.early_exit import check_exits
from infer.self_speculative import Draft, check_draft
from infer.weights import formats_of
from model.model_state import init_state
from model.transformer import Transformer, abstract_variables
from model.unstacked import unstack
from tests import tiny
from tests.probes import (
    Parity,
    check_causality,
    check_decode,
    check_devices,
    drawn,
    inputs,
    read,
)

LOCAL = tiny.attention(window_size=5, num_sink_tokens=1, qk_norm="head", bias=True)
WHOLE = tiny.attention(window_size=None, num_sink_tokens=0, values_from_keys=True, value_norm=True)
DENSE = DenseConfig(d_ff=16, activation="geglu")
ADDED = PerLayerEmbeddingConfig(width=6)


def layer(attention, *, is_sharing=False, **changes):
    attention = dataclasses.replace(attention, shares_keys=is_sharing)
    return LayerSpec(attention=attention, ffn=DENSE, **changes)


OWN = tuple(layer(x, norms="sandwich") for x in (LOCAL, WHOLE))
SHARING = (
    LayerSpec(attention=dataclasses.replace(LOCAL, shares_keys=True), ffn=tiny.moe()),
    layer(WHOLE, is_sharing=True, norms="sandwich", output_scale=True),
)
CONFIG = tiny.model(
    num_layers=7,
    prefix=(OWN[0], *OWN),
    pattern=SHARING,
    per_layer_embeddings=ADDED,
    embedding_scale=2.0,
)
"""Two repetitions that read layers of the prefix."""
INSIDE = tiny.model(num_layers=4, pattern=(OWN[0], SHARING[0]), per_layer_embeddings=ADDED)
"""Two repetitions that read their own first layer."""
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=1e-4)


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize(
    "wrong",
    [
        "keys of its own tokens",
        "first of its kind",
        "widths first",
        "normed together",
        "no context",
        "vector gated",
    ],
)
def test_each_mistake_is_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


@pytest.mark.slow
def test_a_repetition_reads_its_own_first_layer():
    inside = Parity(INSIDE, LENGTH, tolerance=1e-4)
    inside.check()
    check_decode(INSIDE, inside.variables, LENGTH, 11)


@pytest.mark.slow
def test_nothing_sees_the_future(parity):
    check_causality(CONFIG, parity.variables, LENGTH)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 4, 1)])
@pytest.mark.slow
def test_devices_give_the_same(parity, shape):
    check_devices(CONFIG, parity.variables, LENGTH, shape, tolerance=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, INSIDE])
def test_layers_apart_give_the_same(config):
    model, variables = Transformer(config), drawn(config)
    expected, _ = read(model, variables, *inputs(config, LENGTH))
    apart, own = unstack(model, variables)
    found, _ = read(apart, own, *inputs(config, LENGTH))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_the_same_scanned_recomputed_and_in_a_row():
    """12 layers, which a loop runs; one kept pass, and one computed again."""
    config = dataclasses.replace(CONFIG, num_layers=15)
    variables, rows = drawn(config), inputs(config, LENGTH)

    def gradients(config, variables, **execution):
        model = Transformer(config, ExecutionConfig(**execution))

        def loss(params):
            hidden_BLD, _ = read(model, variables | {"params": params}, *rows)
            weights_D = np.arange(config.d_model, dtype=np.float32)
            return (hidden_BLD**2 * weights_D[None, None]).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    kept, again = (gradients(config, variables, remat=kind) for kind in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), kept, again)
    apart, own = unstack(Transformer(config), variables)
    found = gradients(apart.config, own)
    source = ("prefix_1", "attention", "kv")
    for name in (source, ("per_layer_embeddings", "table")):
        one, other = kept, found
        for key in name:
            one, other = one[key], other[key]
        assert np.abs(one).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_layer_that_shares_keys_keeps_none():
    def num_bytes(config, **pages):
        state = jax.eval_shape(lambda: init_state(config, 2, 16, "bfloat16", **pages))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    alone = dataclasses.replace(CONFIG, num_layers=5, pattern=OWN, prefix=(OWN[0],))
    for pages in ({}, {"num_pages": 9, "page_size": 4}):
        first = num_bytes(dataclasses.replace(alone, num_layers=3), **pages)
        assert num_bytes(CONFIG, **pages) == first < num_bytes(alone, **pages)


@pytest.mark.parametrize("config", [CONFIG, INSIDE])
def test_parameters_are_counted(config):
    abstract, _ = abstract_variables(Transformer(config))
    found = sum(x.size for x in jax.tree.leaves(abstract["params"]))
    assert found == config.num_parameters
    table = config.vocab_size * config.num_layers * ADDED.width
    assert config.num_looked_up_parameters == table + config.vocab_size * config.d_model


def test_the_table_is_never_held_in_four_bits():
    """As embedding and output layer."""
    added = PerLayerEmbeddingConfig(width=64)
    config = dataclasses.replace(CONFIG, vocab_size=512, d_model=64, per_layer_embeddings=added)
    formats = formats_of(Transformer(config), "int4")
    assert formats["['per_layer_embeddings']['table']"] == formats["['embedding']"] == "int8"
    assert formats["['per_layer_embeddings']['projection']"] == "int4"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prefix": (), "num_layers": 2}, "no layer before it has the same attention"),
        ({"prefix": OWN[:1], "num_layers": 3}, "no layer before it has the same attention"),
        (
            {"pattern": (SHARING[0], OWN[0]), "num_layers": 7},
            "reads layer 1 of the prefix at first and layer 4 of the pattern",
        ),
        ({"hyper_connections": HyperConnectionConfig()}, "hyper_connections"),
        (
            {"early_exit": EarlyExitConfig(dropout=0.1, loss_scale=0.2, rotation=1)},
            "not built with hyper_connections or early_exit",
        ),
        (
            {"pattern": (SHARING[0], layer(LOCAL, depth=MixtureOfDepthsConfig(capacity=0.5)))},
            "shares_keys is not built in a model with depth",
        ),
        ({"multi_token": MultiTokenConfig(layer=OWN[0])}, "per_layer_embeddings is not built"),
        ({"residual_scale": 0.5}, "per_layer_embeddings is not built"),
    ],
)
def test_what_does_not_go_together_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match="a module has no layer before it"):
        MultiTokenConfig(layer=SHARING[0])


def test_layers_can_not_run_a_few_at_a_time():
    config = dataclasses.replace(INSIDE, pattern=INSIDE.pattern * 2, exit_spacing=2)
    for check in (check_exits, lambda model: check_draft(model, Draft())):
        with pytest.raises(UserError, match="early exits and drafts by a model's own first layers"):
            check(Transformer(config))
