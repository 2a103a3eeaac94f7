"""Several residual streams, experts by token and bounded SwiGLU: against numpy, through the cache,
on a mesh; and the limits in which streams are the ordinary residual.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import HyperConnectionConfig, LayerSpec, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, RouterConfig
from model.growth import grown_config
from model.hyper_connections import doubly_stochastic
from model.router import token_experts
from model.transformer import Transformer, abstract_variables, init_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, check_devices, inputs, read

BY_TOKEN = RouterConfig(
    top_k=2, scores="sqrt_softplus", choice="token", gate_scale=1.5, load_balance_weight=0.0
)
BOUNDED = {"activation": "bounded_swiglu", "swiglu_limit": 0.4}
CONFIG = tiny.model(
    num_layers=3,
    pattern=(
        LayerSpec(attention=tiny.attention(), ffn=tiny.moe(router=BY_TOKEN, **BOUNDED)),
        LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16, **BOUNDED)),
        LayerSpec(
            attention=tiny.attention(),
            ffn=tiny.moe(router=RouterConfig(top_k=2, scores="sqrt_softplus"), **BOUNDED),
        ),
    ),
    hyper_connections=HyperConnectionConfig(num_streams=3, sinkhorn_steps=3, eps=1e-3),
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize(
    "wrong",
    [
        "shared the other way",
        "rows first",
        "normed apart",
        "mean of streams",
        "chosen by scores",
        "no bounds",
        "gate bounded below",
    ],
)
def test_each_mistake_is_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


@pytest.mark.slow
def test_nothing_sees_the_future(parity):
    check_causality(CONFIG, parity.variables, LENGTH)


@pytest.mark.parametrize("shape", [(1, 2, 2), pytest.param((1, 4, 1), marks=pytest.mark.slow)])
@pytest.mark.thinned(2)
def test_devices_give_the_same(parity, shape):
    check_devices(CONFIG, parity.variables, LENGTH, shape, tolerance=2e-5)


def test_weights_are_counted():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


@pytest.mark.slow
def test_training_begins_as_the_ordinary_residual():
    """With mixing that the token does not change, all streams are equal and read evenly: the model
    is the one without them, to eps."""
    config = dataclasses.replace(
        CONFIG, hyper_connections=HyperConnectionConfig(num_streams=3, eps=1e-9)
    )
    plain = dataclasses.replace(CONFIG, hyper_connections=None)
    variables = init_variables(Transformer(config), 3)

    def without_mix(path, x):
        return 0 * x if jax.tree_util.keystr(path).endswith("['mix']") else x

    variables = jax.tree_util.tree_map_with_path(without_mix, variables)
    bare = jax.tree.map(lambda x: x, variables)
    del bare["params"]["final_streams"]
    for layer in bare["params"]["periods"].values():
        del layer["attention_streams"], layer["ffn_streams"]
    row = inputs(config, LENGTH)
    found, _ = read(Transformer(config), variables, *row)
    expected, _ = read(Transformer(plain), bare, *row)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_sharing_is_doubly_stochastic():
    c = jnp.exp(jnp.asarray(np.random.RandomState(0).randn(2, 3, 4, 4), jnp.float32))
    shared = np.asarray(doubly_stochastic(c, 20, 1e-6))
    np.testing.assert_allclose(shared.sum(-2), 1, atol=1e-5)
    np.testing.assert_allclose(shared.sum(-1), 1, atol=1e-3)
    assert (shared > 0).all()


def test_a_first_table_has_different_experts_and_even_load():
    table = np.asarray(token_experts(5000, 24, 6))
    assert all(len(set(row)) == 6 for row in table)
    load = np.bincount(table.reshape(-1), minlength=24) / table.size * 24
    assert 0.8 < load.min() <= load.max() < 1.2


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: HyperConnectionConfig(num_streams=1), "num_streams=1 must be at least 2"),
        (
            lambda: dataclasses.replace(
                CONFIG, multi_token=MultiTokenConfig(layer=CONFIG.pattern[0])
            ),
            "hyper_connections is not built with early_exit, multi_token",
        ),
        (
            lambda: dataclasses.replace(
                CONFIG, pattern=(dataclasses.replace(CONFIG.pattern[0], norms="post"),)
            ),
            "hyper_connections is not built with layers of norms='post'",
        ),
        (lambda: RouterConfig(top_k=2, choice="token"), "a load that no loss can change"),
        (
            lambda: dataclasses.replace(BY_TOKEN, balance="loss_free", bias_rate=0.1),
            "names the experts by a table: leave num_groups, balance",
        ),
        (lambda: DenseConfig(d_ff=8, swiglu_limit=1.0), "swiglu_limit=1.0 goes with"),
        (lambda: DenseConfig(d_ff=8, activation="bounded_swiglu"), "swiglu_limit=None goes with"),
        (lambda: grown_config(CONFIG, "copy"), "growth has no rows for router.choice='token'"),
    ],
)
def test_what_would_be_ignored_is_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
