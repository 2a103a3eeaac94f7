"""Mamba-2, layers of one branch, ReLU^2 and latent MoE: the equations, causality, a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MixtureOfDepthsConfig
from configs.attention_traits import NoAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig, NoFeedForwardConfig, RouterConfig
from configs.recurrent_attention import Mamba2Config
from model.growth import grown_config
from model.model_state import (
    copy_page,
    init_state,
    put_pages,
    put_rows,
    rewind,
    take_pages,
    take_rows,
)
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_devices, drawn, empty_state

LENGTH = 20
HEADS = {"num_heads": 4, "head_dim": 8, "state_dim": 6}
NOTHING, ALONE = NoAttentionConfig(), NoFeedForwardConfig()
EXPERTS = MoEConfig(
    num_experts=8,
    d_ff=16,
    num_shared_experts=1,
    shared_d_ff=20,
    latent_width=12,
    activation="relu2",
    router=RouterConfig(top_k=2, scores="sigmoid"),
)
GROUPED = Mamba2Config(**HEADS, num_groups=2, norm_by_group=True)
BIASED = Mamba2Config(**HEADS, bias=True, conv_bias=False, conv_width=3, least_step=0.5)
NEMOTRON = tiny.model(
    num_layers=8,
    pattern=(
        LayerSpec(attention=GROUPED, ffn=ALONE),
        LayerSpec(attention=NOTHING, ffn=EXPERTS),
        LayerSpec(attention=tiny.attention(rotary_dim=0), ffn=ALONE),
        LayerSpec(attention=NOTHING, ffn=DenseConfig(d_ff=16, activation="relu2", bias=True)),
    ),
)
GRANITE = tiny.model(
    pattern=(
        LayerSpec(attention=BIASED, ffn=tiny.moe(shared_d_ff=24)),
        LayerSpec(attention=tiny.attention(), ffn=tiny.moe(shared_d_ff=24)),
    ),
    residual_scale=0.5,
)


@pytest.fixture(scope="module")
def parity():
    return Parity(NEMOTRON, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def test_beside_a_feed_forward_too():
    Parity(GRANITE, LENGTH, tolerance=3e-5).check()


MISTAKES = (
    "document goes on",
    "taps see before",
    "heads interleaved",
    "writes all",
    "norm before gate",
)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_told_apart(wrong, parity):
    parity.check_told_apart(wrong)


def test_causality():
    check_causality(NEMOTRON, drawn(NEMOTRON), LENGTH)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 4, 1)])
@pytest.mark.thinned(2)
def test_devices_give_the_same(sizes, parity):
    check_devices(NEMOTRON, parity.variables, LENGTH, sizes, tolerance=2e-5)


@pytest.mark.parametrize("config", [NEMOTRON, GRANITE])
def test_weights_are_counted(config):
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters


def test_a_layer_has_the_norms_of_its_branches_alone():
    params = drawn(NEMOTRON)["params"]["periods"]
    norms = [sorted(name for name in params[f"layer_{i}"] if "norm" in name) for i in range(4)]
    assert norms == [["attention_norm"], ["ffn_norm"], ["attention_norm"], ["ffn_norm"]]


def test_layers_that_keep_nothing_lie_beside_those_that_do():
    """Stacked over periods: rows taken and put back, pages copied, tokens taken back."""
    state = empty_state(NEMOTRON, 3, 8, "float32")
    filled = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape).astype(x.dtype), state)
    row = np.array([2])
    again = jax.jit(lambda: put_rows(state, row, take_rows(filled, row)))()
    for old, new in zip(jax.tree.leaves(filled), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old[:, 2], np.asarray(new)[:, 2])
    paged = tiny.model(num_layers=4, pattern=NEMOTRON.pattern[2:])

    @jax.jit
    def steps():
        pages = init_state(paged, 1, 8, "float32", num_pages=3, page_size=4)
        copied = copy_page(pages, jnp.int32(1), jnp.int32(2))
        back = put_pages(pages, jnp.array([1]), take_pages(pages, jnp.array([2])))
        return pages, copied, rewind(back, jnp.zeros(1, jnp.int32))

    pages, copied, back = steps()
    assert jax.tree.structure(copied) == jax.tree.structure(pages)
    assert jax.tree.structure(back) == jax.tree.structure(pages)


def test_the_state_does_not_grow():
    config = tiny.model(num_layers=2, pattern=NEMOTRON.pattern[:2])

    def shapes(length):
        state = jax.eval_shape(lambda: init_state(config, 1, length, "float32"))
        return [x.shape for x in jax.tree.leaves(state)]

    assert shapes(16) == shapes(1 << 20) == [(1, 4, 6, 8), (1, 3, 56)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 3}, "num_heads=4 must be a multiple of num_groups=3"),
        ({"least_step": -1.0}, "least_step=-1.0 must not be negative"),
        ({"state_dim": 0}, "state_dim"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Mamba2Config(**HEADS | settings)


def test_experts_without_gates_do_not_grow():
    with pytest.raises(UserError, match="growth is not built for experts without gates"):
        grown_config(NEMOTRON, "copy")


def test_layers_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="does nothing: leave it out"):
        LayerSpec(attention=NOTHING, ffn=ALONE)
    depth = MixtureOfDepthsConfig(capacity=0.5)
    with pytest.raises(UserError, match="needs an attention"):
        LayerSpec(attention=NOTHING, ffn=DenseConfig(d_ff=8), depth=depth)
    with pytest.raises(UserError, match="needs a feed-forward"):
        LayerSpec(attention=tiny.attention(), ffn=ALONE, depth=depth)
    with pytest.raises(UserError, match="shared_d_ff=8 has no effect"):
        tiny.moe(num_shared_experts=0, shared_d_ff=8)
    with pytest.raises(UserError, match="latent_width=0 must be at least 1"):
        tiny.moe(latent_width=0)
