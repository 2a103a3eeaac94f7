"""Attention over a window and compressed entries: against numpy, streamed, in pieces, on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.compressed_attention import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
)
from configs.feed_forward import DenseConfig
from model.attention import compressed
from model.flops import visible_keys
from model.model_state import init_state
from model.transformer import Transformer, abstract_variables
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, check_devices, inputs, read

WINDOW = CompressedAttentionConfig(
    num_heads=4,
    query_rank=12,
    head_dim=8,
    rotary_dim=4,
    window_size=5,
    num_output_groups=2,
    output_rank=6,
)
HEAVY = dataclasses.replace(WINDOW, compression=CompressionConfig(rate=5), rope_base=500.0)
INDEXER = EntryIndexerConfig(num_heads=4, head_dim=6, top_k=2)
SPARSE = dataclasses.replace(
    WINDOW, compression=CompressionConfig(rate=3, overlaps=True, indexer=INDEXER)
)
DENSE = DenseConfig(d_ff=16)
CONFIG = tiny.model(
    num_layers=3,
    pattern=tuple(LayerSpec(attention=a, ffn=DENSE) for a in (WINDOW, SPARSE, HEAVY)),
)
LENGTH = 30


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize(
    "wrong",
    [
        "result not turned back",
        "too early",
        "entry at its end",
        "no blocks before",
        "series exchanged",
        "one softmax for all channels",
        "a matrix for all",
        "dense",
        "without the sink",
    ],
)
def test_each_mistake_is_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


def test_streamed_compression_for_every_length_of_prompt(parity):
    """Whatever of a block is left over when the prompt ends, decoding goes on as one pass."""
    model, (tokens, positions) = Transformer(CONFIG), inputs(CONFIG, LENGTH)
    expected, _ = read(model, parity.variables, tokens, positions)
    for prompt in range(10, 16):
        padded = np.where(positions < prompt, positions, -1)[:, :16]
        state = init_state(CONFIG, 1, LENGTH, "float32")
        out, state = read(model, parity.variables, tokens[:, :16], padded, state, is_whole=True)
        found = [out[:, :prompt]]
        for i in range(prompt, 20):
            piece = slice(i, i + 1)
            out, state = read(model, parity.variables, tokens[:, piece], positions[:, piece], state)
            found.append(out)
        np.testing.assert_allclose(np.concatenate(found, 1), expected[:, :20], atol=1e-4)


@pytest.mark.slow
def test_pieces_of_queries_give_the_same(parity, monkeypatch):
    """Rows longer than a piece, and prompts over a state."""
    model, (tokens, positions) = Transformer(CONFIG), inputs(CONFIG, LENGTH)
    expected, _ = read(model, parity.variables, tokens, positions)
    state = init_state(CONFIG, 1, LENGTH, "float32", spare=LENGTH)
    monkeypatch.setattr(compressed, "QUERIES", 7)
    jax.clear_caches()
    for kept in (None, state):
        found, _ = read(model, parity.variables, tokens, positions, kept)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.clear_caches()


@pytest.mark.slow
def test_nothing_sees_the_future(parity):
    check_causality(CONFIG, parity.variables, LENGTH)


@pytest.mark.slow
def test_decode_equals_full_forward(parity):
    check_decode(CONFIG, parity.variables, LENGTH, 11)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 2)])
@pytest.mark.slow
def test_devices_give_the_same(parity, shape):
    check_devices(CONFIG, parity.variables, LENGTH, shape, tolerance=2e-5)


def test_weights_are_counted():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters


def test_keys_that_a_query_sees_are_counted():
    places = np.array([1, 3, 5, 12, 100])
    np.testing.assert_array_equal(visible_keys(WINDOW, places), [1, 3, 5, 5, 5])
    np.testing.assert_array_equal(visible_keys(HEAVY, places), [1, 3, 6, 7, 25])
    np.testing.assert_array_equal(visible_keys(SPARSE, places), [1, 4, 6, 7, 7])


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: CompressionConfig(rate=1), "rate=1 must be at least 2"),
        (lambda: dataclasses.replace(WINDOW, rotary_dim=3), "rotary_dim=3 must be even"),
        (lambda: dataclasses.replace(WINDOW, num_output_groups=3), "must be divisible by"),
        (lambda: dataclasses.replace(SPARSE, rotary_dim=8), "head_dim=6 must be at least"),
        (lambda: init_state(CONFIG, 1, 8, "int8"), "no int8 keys"),
        (lambda: init_state(CONFIG, 1, 8, "float32", num_pages=3), "can't lie in pages"),
    ],
)
def test_what_is_not_built_is_refused(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
