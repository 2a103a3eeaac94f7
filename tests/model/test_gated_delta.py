"""The gated delta net and Kimi's form of it: the equations, causality, one state for any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig
from model.model_state import init_state
from model.transformer import Transformer, hidden_states
from parallel.mesh import make_mesh
from tests import tiny
from tests.probes import Parity, check_causality, drawn

LENGTH = 26
HEADS = {"num_heads": 4, "key_head_dim": 6, "value_head_dim": 8}
FORMS = {
    "a decay a head": GatedDeltaConfig(**HEADS, num_key_heads=2),
    "a decay a channel": GatedDeltaConfig(
        **HEADS, decay="channel", gate_rank=5, output_gate="sigmoid", conv_width=3
    ),
    "no gate": GatedDeltaConfig(**HEADS, output_gate=None, conv_width=1),
}


def of(attention):
    spec = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=16))
    return tiny.model(pattern=(spec,), num_layers=2)


@pytest.fixture(scope="module", params=FORMS)
def parity(request):
    return Parity(of(FORMS[request.param]), LENGTH, tolerance=2e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


MISTAKES = ("document goes on", "taps see before", "heads interleaved", "only adds")


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_told_apart(wrong):
    Parity(of(FORMS["a decay a head"]), LENGTH, tolerance=2e-5).check_told_apart(wrong)


def test_causality():
    config = of(FORMS["a decay a channel"])
    check_causality(config, drawn(config), LENGTH)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2)], ids=["rows", "rows and heads"])
@pytest.mark.thinned(2)
def test_a_mesh_gives_what_one_device_gives(sizes):
    """In several chunks: devices of one processor share its threads, and none may wait on them."""
    config = of(FORMS["a decay a head"])
    model, variables = Transformer(config), drawn(config)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (4, 200)).astype(np.int32)
    positions = np.tile(np.arange(200, dtype=np.int32), (4, 1))

    @jax.jit
    def loss_and_gradient(variables):
        return jax.value_and_grad(
            lambda v: jnp.square(hidden_states(model, v, tokens, positions)[0]).mean()
        )(variables)

    expected = loss_and_gradient(variables)
    with jax.set_mesh(make_mesh(*sizes)):
        found = loss_and_gradient(variables)
    # Float32 sums over rows in another order; gradients that cancel keep the size of their terms.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def test_parameters_are_counted():
    for attention in FORMS.values():
        variables = drawn(of(attention))
        held = variables["params"]["periods"]["layer_0"]["attention"]
        count = sum(x.size // len(x) for x in jax.tree.leaves(held))
        assert count == attention.num_parameters(of(attention).d_model)


def test_the_state_does_not_grow():
    config = of(FORMS["a decay a head"])

    def size(length):
        state = jax.eval_shape(lambda: init_state(config, 1, length, "float32"))
        return sum(x.size for x in jax.tree.leaves(state))

    assert size(16) == size(1 << 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_key_heads": 3}, "num_heads=4 must be a multiple of num_key_heads=3"),
        ({"decay": "channel"}, "decay='channel' needs a gate_rank"),
        ({"gate_rank": 0}, "gate_rank=0 must be at least 1"),
        ({"gate_rank": 4, "output_gate": None}, "gate_rank=4 has no effect"),
        ({"conv_width": 0}, "conv_width"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GatedDeltaConfig(**HEADS | settings)
