"""A model with weights of its own for each layer against the stacked one."""

import functools

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig
from infer.early_exit import check_exits, exit_step
from model import block
from model.model_state import init_state
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_states,
    init_variables,
    output_weights,
)
from model.unstacked import unstack, unstack_preference
from tests import tiny
from tests.probes import drawn

CONFIG = tiny.model(
    prefix=(LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16)),),
    pattern=(
        LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=tiny.moe()),
        LayerSpec(attention=tiny.attention(window_size=5), ffn=DenseConfig(d_ff=16)),
    ),
    num_layers=7,
)
TOKENS = np.random.RandomState(0).randint(0, 300, (2, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))


@pytest.fixture(scope="module")
def models():
    model, variables = Transformer(CONFIG), drawn(CONFIG, seed=1)
    return model, variables, *unstack(model, variables)


@functools.partial(jax.jit, static_argnums=0)
def read_token(model, variables, cache, threshold):
    return exit_step(model, variables, TOKENS[:, 0], POSITIONS[:, 0], cache, threshold)


def test_it_is_the_same_model(models):
    model, variables, flat, own = models
    expected_shapes, _ = abstract_variables(flat)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), own, expected_shapes)
    assert (flat.config.num_periods, len(flat.config.pattern)) == (1, 6)
    assert flat.config.num_parameters == CONFIG.num_parameters
    expected, _ = jax.jit(lambda v: hidden_states(model, v, TOKENS, POSITIONS))(variables)
    hidden, _ = jax.jit(lambda v: hidden_states(flat, v, TOKENS, POSITIONS))(own)
    # The same sums in programs that XLA fuses differently.
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


def test_equal_layers_are_traced_once(models, monkeypatch):
    *_, flat, own = models
    traced = []
    attention = block.attention_layer

    def counted(*arguments, **settings):
        traced.append(arguments)
        return attention(*arguments, **settings)

    monkeypatch.setattr(block, "attention_layer", counted)
    tokens, positions = TOKENS[:, :7], POSITIONS[:, :7]  # a length that no other test has traced
    jax.eval_shape(lambda v: hidden_states(flat, v, tokens, positions), own)
    assert len(traced) < flat.config.num_layers == 7


@pytest.mark.slow
def test_shared_layers_do_not_change_what_a_seed_draws(monkeypatch):
    config = tiny.model(pattern=CONFIG.pattern[1:] * 2, num_layers=2)
    draw = jax.jit(init_variables, static_argnums=(0, 1))
    shared = draw(Transformer(config), 0)
    monkeypatch.setattr(block, "_TracedOnce", block.Block)
    draw.clear_cache()
    jax.tree.map(np.testing.assert_array_equal, shared, draw(Transformer(config), 0))


def test_exits_stay_where_they_were(models):
    model, variables, flat, own = models
    check_exits(flat)
    made = {
        threshold: read_token(flat, own, init_state(flat.config, 2, 12, "float32"), threshold)
        for threshold in (0.0, 2.0)
    }
    np.testing.assert_array_equal(made[0.0].layers_B, 3)  # the prefix, and the pattern once
    np.testing.assert_array_equal(made[2.0].layers_B, 7)
    expected, _ = jax.jit(lambda v: hidden_states(model, v, TOKENS[:, :1], POSITIONS[:, :1]))(
        variables
    )
    expected = expected[:, 0] @ output_weights(model, variables)
    np.testing.assert_allclose(made[2.0].logits_BV, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_a_repeated_pattern_are_no_steps(models):
    model, variables, *_ = models
    with pytest.raises(ValueError, match="unstack the model"):
        read_token(model, variables, init_state(model.config, 2, 12, "float32"), 0.5)


@pytest.mark.slow
def test_preferences_follow_their_layers(models):
    model, variables, flat, own = models
    wanted = np.random.RandomState(2).randn(3, 1, 8).astype(np.float32) * 5
    preference = {"layer_0": wanted}
    split = unstack_preference(model, preference)
    assert {name: x.shape for name, x in split.items()} == {
        f"layer_{i}": (1, 1, 8) for i in (0, 2, 4)
    }
    expected, _ = jax.jit(lambda v, p: hidden_states(model, v, TOKENS, POSITIONS, None, p))(
        variables, preference
    )
    read = jax.jit(lambda v, p: hidden_states(flat, v, TOKENS, POSITIONS, None, p)[0])
    np.testing.assert_allclose(read(own, split), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(read(own, split) - read(own, {})).max() > 0.01
