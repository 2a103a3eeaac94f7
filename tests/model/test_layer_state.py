"""Every kind of state: reading in any pieces, from slots or pages, after taking back, from a
snapshot, gives what one pass gives.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MixtureOfDepthsConfig
from configs.attention import (
    IndexerConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    QueryTemperatureConfig,
    RelativeAttentionConfig,
)
from configs.attention_traits import NoAttentionConfig
from configs.checks import UserError
from configs.compressed_attention import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
)
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from configs.recurrent_attention import GatedDeltaConfig, Mamba2Config, ShortConvConfig
from model.attention import kinds
from model.model_state import (
    copy_page,
    init_state,
    put_rows,
    rewind,
    state_axes,
    take_rows,
    unrewindable_reason,
    with_pages_of,
)
from model.step import make_step
from model.transformer import Transformer, forward
from parallel.sharding import partition_spec
from tests import tiny
from tests.probes import drawn
from tests.probes import read as read_rows

LENGTH, ROWS, PAGE = 24, 3, 8
PROMPT = 12
DENSE = DenseConfig(d_ff=16)
LATENT = {
    "num_heads": 2,
    "query_rank": 12,
    "latent_rank": 8,
    "nope_head_dim": 8,
    "rope_head_dim": 4,
    "value_head_dim": 6,
}
INDEXED = LatentAttentionConfig(**LATENT, indexer=IndexerConfig(num_heads=2, head_dim=6, top_k=5))
COMPRESSED = {
    "num_heads": 4,
    "query_rank": 12,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_output_groups": 2,
    "output_rank": 6,
}
SPARSE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def sharing(attention, setting="shares_keys"):
    """A layer, and two repetitions of one that reads its keys, or takes its choice of them."""
    own, reading = (
        LayerSpec(attention=dataclasses.replace(attention, **{setting: x}), ffn=DENSE)
        for x in (False, True)
    )
    return tiny.model(
        prefix=(own,),
        pattern=(reading,),
        num_layers=3,
        per_layer_embeddings=PerLayerEmbeddingConfig(width=4),
    )


def of(attention, ffn=DENSE, depth=None):
    spec = LayerSpec(attention=attention, ffn=ffn, depth=depth)
    is_plain = depth is None and isinstance(ffn, DenseConfig)
    return tiny.model(prefix=(spec,) if is_plain else (), pattern=(spec,), num_layers=2)


KINDS = {
    "all tokens": of(tiny.attention(window_size=None, num_sink_tokens=0)),
    "ring": of(tiny.attention(window_size=6, num_sink_tokens=2)),
    "shared keys": sharing(tiny.attention(window_size=None, num_sink_tokens=0)),
    "shared ring": sharing(tiny.attention(window_size=6, num_sink_tokens=2)),
    "sink logits": of(tiny.attention(window_size=6, num_sink_tokens=0, sink_logits=True)),
    "turned in part": of(
        tiny.attention(
            window_size=None,
            num_sink_tokens=0,
            rotary_dim=4,
            score_scale=0.5,
            qk_norm="head",
            qk_norm_after_rope=True,
        )
    ),
    "no positions": of(tiny.attention(window_size=None, num_sink_tokens=0, rotary_dim=0)),
    "chunks": of(
        tiny.attention(
            window_size=None,
            num_sink_tokens=0,
            chunk_size=7,
            score_cap=0.6,
            query_temperature=QueryTemperatureConfig(growth=0.5, length=5),
            value_norm=True,
            values_from_keys=True,
        )
    ),
    "latent": of(LatentAttentionConfig(**LATENT)),
    "indexed": of(INDEXED),
    "shared indexer": sharing(INDEXED, "shares_indexer"),
    "context router": of(
        tiny.attention(window_size=6),
        tiny.moe(router=RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=5))),
    ),
    "powers of two": of(LocalSparseAttentionConfig(**SPARSE, window_size=3, num_sink_tokens=1)),
    "summaries": of(
        LocalSparseAttentionConfig(
            **SPARSE, window_size=3, num_sink_tokens=0, far="summaries", block_size=2
        )
    ),
    "relative": of(RelativeAttentionConfig(num_heads=2, head_dim=8, memory_length=7)),
    "all entries": of(
        CompressedAttentionConfig(
            **COMPRESSED, window_size=4, compression=CompressionConfig(rate=5)
        )
    ),
    "chosen entries": of(
        CompressedAttentionConfig(
            **COMPRESSED,
            window_size=4,
            compression=CompressionConfig(
                rate=4,
                overlaps=True,
                indexer=EntryIndexerConfig(num_heads=3, head_dim=6, top_k=2),
            ),
        )
    ),
    "gated delta": of(
        GatedDeltaConfig(num_heads=4, num_key_heads=2, key_head_dim=6, value_head_dim=8)
    ),
    "channel delta": of(
        GatedDeltaConfig(
            num_heads=2,
            key_head_dim=6,
            value_head_dim=8,
            decay="channel",
            output_gate="sigmoid",
            gate_rank=4,
        )
    ),
    "delta beside keys": tiny.model(
        pattern=(
            LayerSpec(
                attention=GatedDeltaConfig(num_heads=2, key_head_dim=6, value_head_dim=8), ffn=DENSE
            ),
            LayerSpec(attention=tiny.attention(window_size=6), ffn=DENSE),
        ),
        num_layers=4,
    ),
    "short convolution": of(ShortConvConfig(channels=24, conv_width=4, bias=True)),
    "mamba 2": of(Mamba2Config(num_heads=4, head_dim=6, state_dim=5, num_groups=2, bias=True)),
    "none": of(NoAttentionConfig()),
    "mixture of depths": of(
        tiny.attention(window_size=6),
        depth=MixtureOfDepthsConfig(capacity=0.5, selection="threshold"),
    ),
}
DELTA = ("gated delta", "channel delta", "short convolution", "mamba 2")
ENTRIES = ("all entries", "chosen entries")
ALONE = (*DELTA, "none")
UNPAGED = ("powers of two", "summaries", "relative", "all entries", *ALONE, "mixture of depths")
UNREWOUND = ("summaries", "delta beside keys", *DELTA)
UNMIXED = ("powers of two", "summaries", "relative", "delta beside keys", *ENTRIES, *DELTA)
PAGED = [name for name in KINDS if name not in UNPAGED]
SPARE = 5
made = jax.jit(
    init_state, static_argnums=range(5), static_argnames=("spare", "num_pages", "page_size")
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A model, its variables, tokens of three sequences, and what one pass makes of them."""
    config = KINDS[request.param]
    model, variables = Transformer(config), drawn(config, seed=4)
    tokens = np.random.RandomState(1).randint(0, 300, (ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    expected, _ = read_rows(model, variables, tokens, positions)

    @partial(jax.jit, static_argnames="is_whole")
    def read(tokens_BL, positions_BL, state, rows_BL=None, tables_RN=None, is_whole=False):
        step = make_step(
            tokens_BL, positions_BL, rows_BL=rows_BL, tables_RN=tables_RN, is_whole=is_whole
        )
        return forward(model, variables, step, state)

    return request.param, config, read, tokens, positions, np.asarray(expected)


def test_every_kind_is_here():
    assert {type(config.pattern[0].attention) for config in KINDS.values()} == set(kinds.KINDS)


def close(found, expected):
    # float32 sums over keys in another order.
    np.testing.assert_allclose(found, expected, atol=1e-4)


def chunk(tokens, positions, begin: int, count: int):
    """So many tokens of each row, filled up with padding: all chunks share a program."""
    whole = slice(begin, begin + SPARE + 1)
    is_token = np.arange(SPARE + 1) < count
    return tokens[:, whole], np.where(is_token, positions[:, whole], -1).astype(np.int32)


def prompted(read, tokens, positions, state, given):
    """The state after the prompt, read by the program of chunks."""
    for begin in range(0, PROMPT, SPARE + 1):
        count = min(SPARE + 1, PROMPT - begin)
        _, state = read(*chunk(tokens, positions, begin, count), state, **given)
    return state


def tables() -> np.ndarray:
    """Pages of the three sequences, mixed up; page 0 belongs to nobody."""
    pages = np.random.RandomState(2).permutation(np.arange(1, 1 + ROWS * LENGTH // PAGE))
    return pages.reshape(ROWS, -1).astype(np.int32)


def states(kind):
    """Dense and, where it can, paged: the state, and what a step needs to read it."""
    name, config, *_ = kind
    yield made(config, ROWS, LENGTH, "float32", SPARE), {}
    if name in PAGED:
        pages = 1 + ROWS * LENGTH // PAGE
        state = made(config, ROWS, LENGTH, "float32", SPARE, num_pages=pages, page_size=PAGE)
        # What a page holds before it is written may be anything.
        dirty = jax.tree.map(
            lambda x: np.full_like(x, np.nan) if x.dtype == jnp.float32 else x, state
        )
        yield with_pages_of(state, dirty), {"tables_RN": tables()}


@pytest.mark.thinned(4)
def test_a_prompt_and_then_token_by_token(kind):
    _, _, read, tokens, positions, expected = kind
    for state, given in states(kind):
        out, state = read(tokens[:, :PROMPT], positions[:, :PROMPT], state, is_whole=True, **given)
        close(out, expected[:, :PROMPT])
        for i in range(PROMPT, LENGTH):
            out, state = read(tokens[:, i : i + 1], positions[:, i : i + 1], state, **given)
            close(out[:, 0], expected[:, i])


@pytest.mark.thinned(3)
def test_in_chunks_with_padding(kind):
    """Chunks of at most SPARE + 1 tokens, each row's of another length, filled up with padding."""
    _, _, read, tokens, _, expected = kind
    for state, given in states(kind):
        read_R = np.zeros(ROWS, int)
        random = np.random.RandomState(3)
        while (read_R < LENGTH).any():
            count_R = np.minimum(random.randint(1, SPARE + 2, ROWS), LENGTH - read_R)
            places = read_R[:, None] + np.arange(SPARE + 1)
            is_token = np.arange(SPARE + 1) < count_R[:, None]
            at = np.minimum(places, LENGTH - 1)
            pieces = np.take_along_axis(tokens, at, 1)
            out, state = read(
                pieces, np.where(is_token, places, -1).astype(np.int32), state, **given
            )
            for row, count in enumerate(count_R):
                close(out[row, :count], expected[row, read_R[row] : read_R[row] + count])
            read_R += count_R


@pytest.mark.thinned(4)
def test_taken_back_and_read_again(kind):
    """Three tokens are replaced by wrong ones, which are then taken back."""
    name, config, read, tokens, positions, expected = kind
    if name in UNREWOUND:
        assert unrewindable_reason(config) is not None
        with pytest.raises(ValueError, match="can't be rewound"):
            rewind(init_state(config, ROWS, LENGTH, "float32"), jnp.zeros(ROWS, jnp.int32))
        return
    for state, given in states(kind):
        state = prompted(read, tokens, positions, state, given)
        wrong, places = chunk((tokens + 7) % 300, positions, PROMPT, 3)
        _, state = read(wrong, places, state, **given)
        state = jax.jit(rewind)(state, np.full(ROWS, PROMPT))
        out, _ = read(*chunk(tokens, positions, PROMPT, 4), state, **given)
        close(out[:, :4], expected[:, PROMPT : PROMPT + 4])


@pytest.mark.thinned(4)
def test_a_snapshot_goes_on_from_where_it_was_taken(kind):
    """Two rows are kept, others read on over them; then they come back, in the other order."""
    _, config, read, tokens, positions, expected = kind
    state = made(config, ROWS, LENGTH, "float32", SPARE)
    state = prompted(read, tokens, positions, state, {})
    kept = jax.jit(take_rows)(state, np.array([0, 2]))
    _, state = read(*chunk(tokens, positions, PROMPT, 4), state)
    state = jax.jit(put_rows)(state, np.array([1, 0]), kept)
    out, _ = read(*chunk(tokens[[2, 0, 1]], positions, PROMPT, 2), state)
    close(out[:2, :2], expected[[2, 0], PROMPT : PROMPT + 2])


@pytest.mark.thinned(3)
def test_sequences_in_one_row(kind):
    """A prompt of one request between a token of two others: one row of a ragged step."""
    name, _, read, tokens, positions, expected = kind
    parts = [(1, slice(12, 13)), (2, slice(3, 8)), (0, slice(9, 10))]
    rows = np.concatenate([np.full(p.stop - p.start, r) for r, p in parts])[None].astype(np.int32)
    row_of = partial(np.concatenate, axis=0)
    flat = (
        row_of([tokens[r, p] for r, p in parts])[None],
        row_of([positions[r, p] for r, p in parts])[None],
    )
    for state, given in states(kind):
        starts = np.array([9, 12, 3])[:, None]
        before = np.where(positions[:, :PROMPT] < starts, positions[:, :PROMPT], -1)
        _, state = read(tokens[:, :PROMPT], before, state, is_whole=True, **given)
        if name in UNMIXED:
            with pytest.raises(NotImplementedError, match="give each sequence a row of tokens"):
                read(*flat, state, rows, **given)
            return
        out, _ = read(*flat, state, rows, **given)
        wanted = row_of([expected[r, p] for r, p in parts])
        close(out[0], wanted)


@pytest.mark.parametrize("name", KINDS)
def test_every_array_names_its_axes(name):
    sizes = {"num_pages": 1 + ROWS * LENGTH // PAGE, "page_size": PAGE}
    for pages in [{}, sizes] if name in PAGED else [{}]:
        make = partial(init_state, KINDS[name], ROWS, LENGTH, "float32", SPARE, **pages)
        state = jax.eval_shape(make)
        flat, tree = jax.tree.flatten(state)
        for x, names in zip(flat, tree.flatten_up_to(state_axes(state)), strict=True):
            assert len(names) == x.ndim
            partition_spec(names)


@pytest.mark.parametrize("name", UNPAGED)
def test_kinds_that_have_no_pages_say_so(name):
    with pytest.raises(UserError, match="can't lie in pages"):
        init_state(KINDS[name], ROWS, LENGTH, "float32", num_pages=9)


@pytest.mark.parametrize("name", ["ring", "latent", "shared ring"])
def test_a_shared_page_is_copied_before_it_is_written(name):
    """A second sequence goes on from the first one's pages, the last of which it copies."""
    config = KINDS[name]
    model, variables = Transformer(config), drawn(config, seed=4)
    tokens = np.random.RandomState(5).randint(0, 300, (1, 10)).astype(np.int32)
    positions = np.arange(10, dtype=np.int32)[None]
    read = jax.jit(lambda t, p, s, n: forward(model, variables, make_step(t, p, tables_RN=n), s))
    state = made(config, 1, 12, "float32", num_pages=6, page_size=4)
    _, state = read(tokens, positions, state, np.array([[1, 2, 3]], np.int32))
    state = jax.jit(copy_page)(state, np.int32(3), np.int32(5))
    other = (tokens[:, :1] + 3) % 300
    at = np.array([[10]], np.int32)
    new, state = read(other, at, state, np.array([[1, 2, 5]], np.int32))
    old, _ = read(tokens[:, 1:2], at, state, np.array([[1, 2, 3]], np.int32))
    for token, found in ((other, new), (tokens[:, 1:2], old)):
        whole = np.concatenate([tokens, token], axis=1)
        expected, _ = read_rows(model, variables, whole, np.arange(11, dtype=np.int32)[None])
        close(found[:, 0], expected[:, -1])


@pytest.mark.parametrize("name", ["ring", "shared ring"])
def test_int8_keys_are_near(name):
    """A scale to a position and head: the largest channel is kept to 1/254 of itself."""
    config = KINDS[name]
    model, variables = Transformer(config), drawn(config, seed=4)
    tokens = np.random.RandomState(1).randint(0, 300, (1, LENGTH)).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    expected, _ = read_rows(model, variables, tokens, positions)
    state = made(config, 1, LENGTH, "int8", LENGTH)
    assert {x.dtype for x in jax.tree.leaves(state)} == {
        jnp.dtype(d) for d in ("int8", "int32", "float32")
    }
    found, _ = read_rows(model, variables, tokens, positions, state)
    error = np.abs(np.asarray(found - expected))
    assert 1e-5 < error.max() < 0.1 * np.abs(expected).max()
