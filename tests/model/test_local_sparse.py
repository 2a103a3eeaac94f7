"""A model with both kinds of local sparse attention against numpy, its cache and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import LocalSparseAttentionConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from model.model_state import init_state
from model.transformer import Transformer, abstract_variables, hidden_states
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, drawn, inputs

POWERS = LocalSparseAttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, window_size=5, num_sink_tokens=2
)
SUMMARIES = dataclasses.replace(
    POWERS, window_size=6, num_sink_tokens=0, far="summaries", block_size=4
)
LENGTH = 41


def config_of(*attentions):
    """One layer of each, with small dense layers."""
    ffn = DenseConfig(d_ff=16)
    pattern = tuple(LayerSpec(attention=a, ffn=ffn) for a in attentions)
    return tiny.model(pattern=pattern, num_layers=len(pattern))


CONFIG = config_of(POWERS, SUMMARIES)


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=2e-5)


@pytest.fixture(scope="module")
def variables(parity):
    return parity.variables


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize("wrong", ["from the window's edge", "too early"])
def test_wrong_versions_are_told_apart(parity, wrong):
    """Powers that begin behind the window, and a bucket that the window still holds."""
    parity.check_told_apart(wrong)


def test_future_tokens_change_nothing_before_them(variables):
    check_causality(CONFIG, variables, LENGTH)


@pytest.mark.parametrize("prefill", [1, 8, 19])
def test_decode_equals_full_forward(variables, prefill):
    """Prefills of 1, 0 and 3 tokens beyond whole blocks of 4."""
    check_decode(CONFIG, variables, LENGTH, prefill)


def test_chunks_of_a_prompt_equal_full_forward(variables):
    """Chunks that begin inside a block; the last ones are cut to one length with padding."""
    model, (tokens, positions) = Transformer(CONFIG), inputs(CONFIG, LENGTH)
    expected, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    read = jax.jit(lambda t, p, c: hidden_states(model, variables, t, p, c))
    cache, pieces = init_state(CONFIG, 1, LENGTH, "float32"), []
    for begin in range(0, LENGTH, 14):
        chunk = slice(begin, begin + 14)
        missing = ((0, 0), (0, 14 - positions[:, chunk].shape[1]))
        new = np.pad(positions[:, chunk], missing, constant_values=-1)
        part, cache = read(np.pad(tokens[:, chunk], missing), new, cache)
        pieces.append(part[:, : 14 - missing[1][1]])
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=1e-4)


def test_a_window_beyond_the_length_is_grouped_query_attention():
    """Also with the same names of parameters."""
    wide = config_of(*(dataclasses.replace(a, window_size=100) for a in (POWERS, SUMMARIES)))
    dense = config_of(*[tiny.attention(window_size=None, num_sink_tokens=0)] * 2)
    variables, (tokens, positions) = drawn(wide), inputs(wide, LENGTH)
    hidden = [
        jax.jit(lambda v, m=Transformer(c): hidden_states(m, v, tokens, positions)[0])(variables)
        for c in (wide, dense)
    ]
    np.testing.assert_allclose(*hidden, atol=2e-6)  # the same sums in blocks of other sizes


def test_any_dtype_and_mode_traces_without_silent_promotion():
    model = Transformer(CONFIG, ExecutionConfig(compute_dtype="bfloat16"))
    variables, _ = abstract_variables(model)
    cache = jax.eval_shape(lambda: init_state(CONFIG, 2, 32, "bfloat16"))
    for length, kept in ((24, None), (24, cache), (1, cache)):
        rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
        hidden, after = jax.eval_shape(
            lambda v, t, c: hidden_states(model, v, t, t, c), variables, rows, kept
        )
        assert hidden.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), kept
        )


def test_the_configs_count_is_the_models():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(UserError, match="num_sink_tokens=2 has no effect with far='summaries'"):
        dataclasses.replace(SUMMARIES, num_sink_tokens=2)
    with pytest.raises(UserError, match="block_size=None goes with far='summaries'"):
        dataclasses.replace(SUMMARIES, block_size=None)
    with pytest.raises(UserError, match="block_size=8 goes with far='summaries'"):
        dataclasses.replace(POWERS, block_size=8)
    with pytest.raises(UserError, match="window_size=0 must be greater than 0"):
        dataclasses.replace(POWERS, window_size=0)
