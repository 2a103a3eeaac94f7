"""What Gemma and its like change in a layer: norms centered on zero; against numpy, through the
cache, and on a mesh.
"""

import dataclasses

import pytest

from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from tests import tiny
from tests.probes import Parity, check_decode

LOCAL = tiny.attention(num_sink_tokens=0, qk_norm="head", zero_centered_qk_norm=True)
DENSE = DenseConfig(d_ff=16)
CONFIG = tiny.model(
    pattern=(
        LayerSpec(attention=LOCAL, ffn=DENSE, norms="sandwich"),
        LayerSpec(attention=LOCAL, ffn=tiny.moe()),
    ),
    zero_centered_norms=True,
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=5e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def with_layer(number: int, **changes):
    """The model with another layer in one place."""
    pattern = list(CONFIG.pattern)
    pattern[number] = dataclasses.replace(pattern[number], **changes)
    return dataclasses.replace(CONFIG, pattern=tuple(pattern))


WRONG = {
    "plain norms": dataclasses.replace(CONFIG, zero_centered_norms=False),
    "plain norm of heads": with_layer(
        0, attention=dataclasses.replace(LOCAL, zero_centered_qk_norm=False)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_switch_counts(parity, wrong):
    parity.check_told_apart(WRONG[wrong])


def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: tiny.attention(zero_centered_qk_norm=True), "no effect with qk_norm=None"),
    ],
)
def test_what_would_be_ignored_is_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
