"""Relative attention against pairs written out, its shift against explicit distances, and
recurrence: segments with memory are one long pass, whatever the memory's length.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import RelativeAttentionConfig
from configs.base import ExecutionConfig
from configs.feed_forward import DenseConfig
from kernels.window_attention import reference
from model.attention.relative import (
    RelativeAttention,
    SegmentMemory,
    relative_shift,
    segment_attention,
)
from model.model_state import ModelState, init_memory, init_state
from model.step import Step
from model.transformer import Transformer, abstract_variables, hidden_states
from tests import oracle, tiny
from tests.probes import check_causality, check_decode, drawn, inputs

LENGTH, SEGMENT = 40, 8
EXACT = 1e-5  # float32 sums over the same keys in another order; activations are of order 1


def config_of(memory_length: int) -> ModelConfig:
    """A layer before the pattern and two periods of it: depth 3."""
    attention = RelativeAttentionConfig(num_heads=3, head_dim=8, memory_length=memory_length)
    dense = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=16))
    return tiny.model(prefix=(dense,), pattern=(dense,), num_layers=3)


LENGTHS = {"memory of the whole past": LENGTH, "memory shorter than the past": 11}


@pytest.fixture(scope="module", params=LENGTHS.values(), ids=LENGTHS.keys())
def relative(request):
    config = config_of(request.param)
    return config, drawn(config)


read = jax.jit(hidden_states, static_argnums=0, static_argnames="is_whole")


def full_pass(config, variables, tokens, positions):
    """Hidden states of rows of at most LENGTH tokens read at once; one compiled shape."""
    length = tokens.shape[1]
    padding = ((0, 0), (0, LENGTH - length))
    tokens, positions = np.pad(tokens, padding), np.pad(positions, padding, constant_values=-1)
    return read(Transformer(config), variables, tokens, positions)[0][:, :length]


def by_segments(config, variables, tokens, positions, segment=SEGMENT):
    """Hidden states of a row read segment by segment with memory."""
    memory = init_memory(config, len(tokens), "float32")
    parts = []
    for begin in range(0, tokens.shape[1], segment):
        piece = slice(begin, begin + segment)
        read_piece = (tokens[:, piece], positions[:, piece], memory)
        hidden, memory = read(Transformer(config), variables, *read_piece)
        parts.append(hidden)
    return jnp.concatenate(parts, axis=1)


def packed_positions(*documents: int) -> np.ndarray:
    return np.concatenate([np.arange(n) for n in documents]).astype(np.int32)[None]


def test_equals_the_numpy_oracle(relative):
    config, variables = relative
    tokens, _ = inputs(config, LENGTH)
    packed = packed_positions(5, 1, 20, 14)
    hidden = full_pass(config, variables, tokens, packed)
    params = jax.device_get(variables["params"])
    expected, _ = oracle.transformer(params, config, tokens[0], packed[0])
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)


# --- One layer alone ----------------------------------------------------------------------------

ALONE = RelativeAttentionConfig(num_heads=2, head_dim=4, memory_length=150)


@pytest.fixture(scope="module")
def layer():
    """200 rows, so that blocks of queries begin before and beyond the first reachable key."""
    random = np.random.RandomState(3)
    shapes = {"q": (12, 2, 4), "kv": (12, 2, 2, 4), "r": (12, 2, 4), "o": (2, 4, 12)}
    shapes |= {"content_bias": (2, 4), "position_bias": (2, 4)}
    w = {name: random.randn(*s).astype(np.float32) * 0.5 for name, s in shapes.items()}
    x = random.randn(200, 12).astype(np.float32)
    positions = packed_positions(30, 170)
    documents = np.repeat([0, 1], [30, 170])
    ours = attend_alone(w, x, positions[0], documents)
    return w, x, positions[0], documents, ours


@jax.jit
def attend_alone(w, x, positions, documents):
    rows = (jnp.asarray(positions)[None], jnp.asarray(documents)[None])
    step = Step(tokens_BL=rows[0], positions_BL=rows[0], segments_BL=rows[1])
    out, _ = RelativeAttention(ALONE, 1.0).apply({"params": w}, x[None], step, None)
    return out[0]


WRONG = {
    "shifted by one too far": lambda distance: distance + 1,
    "shifted by one too little": lambda distance: distance - 1,
    "r in the order of keys": lambda distance: 150 - distance,
}


def test_blocks_of_queries_equal_the_double_loop(layer):
    w, x, positions, documents, ours = layer
    expected = oracle.relative_attention(x, w, ALONE, positions, documents)
    # Angles up to 150 in float32 are exact to 1e-5 and scores are of order 10.
    np.testing.assert_allclose(ours, expected, atol=3e-4)


@pytest.mark.parametrize("r_index", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_shift_is_rejected(layer, r_index):
    w, x, positions, documents, ours = layer
    tail = slice(0, 60)  # two documents are enough
    wrong = oracle.relative_attention(
        x[tail], w, ALONE, positions[tail], documents[tail], r_index=r_index
    )
    assert np.abs(ours[tail] - wrong).max() > 1e-2


def test_what_the_shift_leaves_outside_is_masked(layer):
    """Were it not: one key more on the right, which gets the neighbouring row's scores."""
    scores = jnp.arange(1.0, 7.0).reshape(1, 1, 2, 3)  # distances 2, 1, 0 of two queries
    shifted = np.asarray(relative_shift(scores, 1, 3))[0, 0]
    np.testing.assert_array_equal(shifted, [[2, 3, 0], [4, 5, 6]])
    banded = np.asarray(relative_shift(scores, 2, 4))[0, 0]
    np.testing.assert_array_equal(banded, [[1, 2, 3, 0], [0, 4, 5, 6]])
    w, x, positions, documents, ours = layer
    changed = x.copy()
    changed[20:] += 1.0
    after = attend_alone(w, changed, positions, documents)
    np.testing.assert_array_equal(after[:20], ours[:20])


def test_without_distances_it_is_attention_over_a_window():
    """r = 0 and u = 0: the window kernel's definition without positions."""
    random = np.random.RandomState(4)
    q, k, v = (jnp.asarray(random.randn(2, 90, 3, 8), jnp.float32) for _ in range(3))
    positions = jnp.asarray(np.tile(packed_positions(50, 40), (2, 1)))
    documents = jnp.asarray(np.tile(np.repeat([0, 1], [50, 40])[None], (2, 1)))
    ours = jax.jit(segment_attention)(
        q * 8**-0.5, q * 8**-0.5, k, v, jnp.zeros((18, 3, 8)), positions, documents
    )
    attend = partial(reference.window_attention, window_size=18, num_sink_tokens=0)
    expected = jax.jit(attend)(q, k, v, positions, documents)
    np.testing.assert_allclose(ours, expected, atol=EXACT)


# --- Recurrence ---------------------------------------------------------------------------------


def test_segments_with_memory_are_one_long_pass(relative):
    config, variables = relative
    tokens, positions = inputs(config, LENGTH)
    expected = full_pass(config, variables, tokens, positions)
    ours = by_segments(config, variables, tokens, positions)
    np.testing.assert_allclose(ours, expected, atol=EXACT)


def test_without_memory_segments_are_not(relative):
    """Else the test above would show nothing."""
    config, variables = relative
    tokens, positions = inputs(config, LENGTH)
    expected = full_pass(config, variables, tokens, positions)
    alone = full_pass(config, variables, tokens[:, SEGMENT:], positions[:, SEGMENT:])
    assert np.abs(alone[:, : LENGTH // 2] - expected[:, SEGMENT:][:, : LENGTH // 2]).max() > 1e-2


def test_packed_documents_do_not_see_each_other_across_segments(relative):
    """A document within a segment, one over a border, one that begins at a border."""
    config, variables = relative
    lengths = (3, 13, 24)
    tokens, _ = inputs(config, LENGTH)
    ours = by_segments(config, variables, tokens, packed_positions(*lengths))
    begin = 0
    for length in lengths:
        own = slice(begin, begin + length)
        alone = full_pass(config, variables, tokens[:, own], packed_positions(length))
        np.testing.assert_allclose(ours[:, own], alone, atol=EXACT)
        begin += length


def test_a_stream_that_begins_again_does_not_see_its_end(relative):
    """As at an epoch's end: positions restart, so the memory of other tokens changes nothing."""
    config, variables = relative
    tokens, positions = inputs(config, 2 * SEGMENT)
    restarted = np.concatenate([positions[:, :SEGMENT] + 90, positions[:, :SEGMENT]], axis=1)
    ours = by_segments(config, variables, tokens, restarted)[:, SEGMENT:]
    fresh = by_segments(config, variables, tokens[:, SEGMENT:], positions[:, :SEGMENT])
    np.testing.assert_allclose(ours, fresh, atol=EXACT)


def test_padding_enters_the_memory_without_effect(relative):
    """A document's end, padding to the segment's end, and the next document, as in scoring."""
    config, variables = relative
    tokens, _ = inputs(config, 3 * SEGMENT)
    padding = np.full(SEGMENT - 3, -1, np.int32)
    row = np.concatenate([np.arange(SEGMENT + 3), padding, np.arange(SEGMENT)])
    positions = row[None].astype(np.int32)
    ours = by_segments(config, variables, tokens, positions)
    other = np.where(positions < 0, (tokens + 1) % config.vocab_size, tokens)
    changed = by_segments(config, variables, other, positions)
    np.testing.assert_array_equal(ours[positions >= 0], changed[positions >= 0])
    last = tokens[:, 2 * SEGMENT :]
    alone = by_segments(config, variables, last, positions[:, 2 * SEGMENT :])
    np.testing.assert_allclose(ours[:, 2 * SEGMENT :], alone, atol=EXACT)


def test_positions_may_count_from_anywhere(relative):
    """The first document from 1000, the second from 5; bitwise, for only distances enter."""
    config, variables = relative
    tokens, _ = inputs(config, LENGTH)
    positions = packed_positions(15, 25)
    moved = positions + np.where(np.arange(LENGTH) < 15, 1000, 5)[None].astype(np.int32)
    for way in (full_pass, by_segments):
        plain = way(config, variables, tokens, positions)
        np.testing.assert_array_equal(way(config, variables, tokens, moved), plain)


def test_no_gradient_flows_into_the_memory():
    """But through it: keys and values of remembered tokens teach their weights."""
    config = config_of(11)
    model, variables = Transformer(config), drawn(config)
    tokens, positions = inputs(config, 2 * SEGMENT)
    empty = init_memory(config, 1, "float32")
    first, second = slice(0, SEGMENT), slice(SEGMENT, None)
    _, memory = read(model, variables, tokens[:, first], positions[:, first], empty)

    @jax.jit
    def gradients(variables, memory):
        def loss(variables, x):
            filled = replace_inputs(memory, x)
            segment = (tokens[:, second], positions[:, second], filled)
            hidden, after = hidden_states(model, variables, *segment)
            kept = sum((x**2).sum() for x in inputs_of(after))
            return (hidden**3).sum() + kept

        return jax.grad(loss, argnums=(0, 1))(variables, inputs_of(memory))

    by_weight, by_memory = gradients(variables, memory)
    for gradient in by_memory:
        np.testing.assert_array_equal(gradient, 0.0)
    unseen, _ = gradients(variables, empty)
    for name in ("kv", "r"):
        with_memory = by_weight["params"]["periods"]["layer_0"]["attention"][name]
        without = unseen["params"]["periods"]["layer_0"]["attention"][name]
        assert np.abs(with_memory - without).max() > 1e-3


def inputs_of(memory: ModelState) -> list[jax.Array]:
    return [block.attention.x_BMD for block in (*memory.prefix, *memory.periods)]


def replace_inputs(memory: ModelState, inputs: list[jax.Array]) -> ModelState:
    is_memory = {"is_leaf": lambda x: isinstance(x, SegmentMemory)}
    left = iter(inputs)
    return jax.tree.map(lambda m: m.replace(x_BMD=next(left)), memory, **is_memory)


# --- The probes of every layer kind -------------------------------------------------------------


def test_decode_through_a_ring_equals_one_pass(relative):
    """A prefill longer than the shorter ring: r is made there, and absorbed in the steps after."""
    check_decode(*relative, LENGTH, prefill=14)


def test_future_tokens_change_nothing_before_them(relative):
    check_causality(*relative, LENGTH)


def test_the_configs_count_is_the_models(relative):
    config, _ = relative
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters


def test_models_without_memory_keep_none():
    assert tiny.model().memory_length is None
    assert init_memory(tiny.model(), 2, "float32") is None
    memory = init_memory(config_of(7), 2, "bfloat16")
    assert memory is not None
    shapes = [x.shape for x in jax.tree.leaves(memory)]
    assert shapes == [(2, 7, 32), (2, 7), (2, 2, 7, 32), (2, 2, 7)]


def test_bfloat16_stays_near_float32():
    """In segments and through the cache; the memory is kept in the compute dtype."""
    config = config_of(11)
    variables = drawn(config)
    tokens, positions = inputs(config, LENGTH)
    exact = np.asarray(full_pass(config, variables, tokens, positions))
    model = Transformer(config, ExecutionConfig(compute_dtype="bfloat16"))
    for cache in (init_memory(config, 1, "bfloat16"), init_state(config, 1, LENGTH, "bfloat16")):
        hidden, after = read(model, variables, tokens, positions, cache, is_whole=True)
        assert hidden.dtype == jnp.bfloat16
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cache)
        error = np.abs(np.asarray(hidden, np.float32) - exact).mean() / np.abs(exact).mean()
        assert error < 0.05  # 8 bits of mantissa through 3 layers
