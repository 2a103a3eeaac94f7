"""What public families change in a layer: a part of a head turned or none, norms in other places,
factors, a gate on the shared experts; against numpy, through the cache, and on a mesh.
"""

import dataclasses

import jax
import pytest

from configs.architecture import LayerSpec, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, check_devices

EVERYWHERE = tiny.attention(window_size=None, num_sink_tokens=0)
GLM = dataclasses.replace(EVERYWHERE, rotary_dim=4, bias=True, output_bias=False)
NOPE = dataclasses.replace(EVERYWHERE, rotary_dim=0)
HUNYUAN = tiny.attention(qk_norm="head", qk_norm_after_rope=True, score_scale=0.7)
GATED = tiny.moe(shared_gate=True)
CONFIG = tiny.model(
    num_layers=3,
    pattern=(
        LayerSpec(attention=GLM, ffn=GATED),
        LayerSpec(attention=NOPE, ffn=DenseConfig(d_ff=16), norms="post"),
        LayerSpec(attention=HUNYUAN, ffn=GATED, norms="sandwich"),
    ),
    embedding_scale=1.7,
    residual_scale=0.6,
    logit_scale=1.3,
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def with_layer(number: int, **changes):
    """The model with another layer in one place."""
    pattern = list(CONFIG.pattern)
    pattern[number] = dataclasses.replace(pattern[number], **changes)
    return dataclasses.replace(CONFIG, pattern=tuple(pattern))


WRONG = {
    "whole heads turned": with_layer(0, attention=dataclasses.replace(GLM, rotary_dim=None)),
    "another part turned": with_layer(0, attention=dataclasses.replace(GLM, rotary_dim=2)),
    "no gate": with_layer(0, ffn=tiny.moe()),
    "positions": with_layer(1, attention=EVERYWHERE),
    "norm before RoPE": with_layer(
        2, attention=dataclasses.replace(HUNYUAN, qk_norm_after_rope=False)
    ),
    "plain scores": with_layer(2, attention=dataclasses.replace(HUNYUAN, score_scale=None)),
    "embedding": dataclasses.replace(CONFIG, embedding_scale=1.0),
    "residual": dataclasses.replace(CONFIG, residual_scale=1.0),
    "logits": dataclasses.replace(CONFIG, logit_scale=1.0),
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
@pytest.mark.thinned(3)
def test_devices_give_the_same(parity, shape):
    """Data, expert and tensor axes of the mesh."""
    check_devices(CONFIG, parity.variables, LENGTH, shape, tolerance=2e-5)


def test_weights_are_counted():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: tiny.attention(rotary_dim=3), "rotary_dim=3 must be even"),
        (lambda: tiny.attention(rotary_dim=8), "below head_dim=8"),
        (lambda: tiny.attention(rotary_dim=0, rope_base=5e5), "no effect with rotary_dim=0"),
        (lambda: tiny.attention(output_bias=False), "no effect with bias=False"),
        (lambda: tiny.attention(qk_norm_after_rope=True), "qk_norm_after_rope has no effect"),
        (
            lambda: tiny.attention(qk_norm_after_rope=True, qk_norm="head", rotary_dim=0),
            "qk_norm_after_rope has no effect",
        ),
        (lambda: tiny.attention(score_scale=0.0), "score_scale=0.0 must be greater than 0"),
        (
            lambda: tiny.moe(shared_gate=True, num_shared_experts=0),
            "shared_gate=True has no effect",
        ),
        (lambda: tiny.model(residual_scale=0.0), "residual_scale=0.0 must be greater than 0"),
        (
            lambda: tiny.model(
                logit_scale=2.0, multi_token=MultiTokenConfig(layer=tiny.model().pattern[0])
            ),
            "logit_scale=2.0 is not built with multi_token",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
