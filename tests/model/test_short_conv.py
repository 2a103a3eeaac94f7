"""The gated short convolution against numpy, on a mesh, and counted."""

import jax
import pytest

from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import ShortConvConfig
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_devices

CONFIG = tiny.model(
    num_layers=2,
    pattern=(
        LayerSpec(attention=ShortConvConfig(channels=24, bias=True), ffn=DenseConfig(d_ff=16)),
        LayerSpec(attention=ShortConvConfig(channels=32, conv_width=4), ffn=tiny.moe()),
    ),
)
LENGTH = 20


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


def test_taps_turned_round_are_told_apart(parity):
    parity.check_told_apart("taps turned round")


def test_devices_give_the_same(parity):
    check_devices(CONFIG, parity.variables, LENGTH, (1, 2, 2), tolerance=2e-5)


def test_weights_are_counted():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


def test_one_tap_is_refused():
    with pytest.raises(UserError, match="conv_width=1 must be at least 2"):
        ShortConvConfig(channels=8, conv_width=1)
