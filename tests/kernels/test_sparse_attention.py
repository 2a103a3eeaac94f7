"""Both sparse attentions: blocks and shifts against the dense mask; edges, reach and cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.sparse_attention import (
    cached_power_attention,
    cached_summary_attention,
    empty_nodes,
    num_edges,
    power_attention,
    rebuilt,
    summary_attention,
    updated,
    xla,
)
from kernels.sparse_attention.cases import CASES, Case
from kernels.sparse_attention.reference import seen_by_power_attention
from kernels.window_attention import window_attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 softmax and sums in another order
KINDS = ("powers", "summaries")


def draw(case: Case):
    random = np.random.RandomState(1)
    q_shape = (case.batch, case.length, case.num_heads, case.head_dim)
    kv_shape = (case.batch, case.length, case.num_kv_heads, case.head_dim)
    shapes = (q_shape, kv_shape, kv_shape, kv_shape[2:], q_shape)
    q, k, v, pool, dout = (random.randn(*shape).astype(np.float32) for shape in shapes)
    positions = np.concatenate([np.arange(n) for n in case.documents]).astype(np.int32)
    segments = np.repeat(np.arange(len(case.documents)), case.documents).astype(np.int32)
    padding = case.length - len(positions)
    positions = np.pad(positions, (0, padding), constant_values=-1)
    segments = np.pad(segments, (0, padding), constant_values=len(case.documents))
    dout *= (positions >= 0)[None, :, None, None]
    rows = [np.broadcast_to(a, (case.batch, case.length)) for a in (positions, segments)]
    return q, k, v, pool, *rows, dout


def attend(kind, reach, implementation, q, k, v, pool, positions, segments):
    """Reach is (window_size, num_sink_tokens or block_size)."""
    window, other = reach
    rows, chosen = (positions, segments), {"implementation": implementation}
    if kind == "powers":
        return power_attention(q, k, v, *rows, window_size=window, num_sink_tokens=other, **chosen)
    return summary_attention(q, k, v, pool, *rows, window_size=window, block_size=other, **chosen)


attend_jit = jax.jit(attend, static_argnums=(0, 1, 2))


@jax.jit
def dense_attention(q, k, v, positions, segments):
    reach = {"window_size": None, "num_sink_tokens": 0, "implementation": "reference"}
    return window_attention(q, k, v, positions, segments, **reach)


def reach_of(case: Case, kind: str) -> tuple[int, int]:
    return case.window_size, case.num_sink_tokens if kind == "powers" else case.block_size


def gradients(kind, reach, implementation, *operands, positions, segments, dout):
    """The result where there are tokens, and the gradients of q, k, v and pool."""

    def forward(*operands):
        return attend(kind, reach, implementation, *operands, positions, segments)

    out, pull = jax.vjp(forward, *operands)
    return jnp.where((positions >= 0)[:, :, None, None], out, 0.0), *pull(dout)


run = jax.jit(gradients, static_argnums=(0, 1, 2))  # cases that differ in their documents share it


def check_equal(ours, theirs):
    """Results to 1e-5; gradients, sums over many rows, to 1e-5 of their largest entry."""
    for a, b, what in zip(ours, theirs, "oqkvp", strict=True):
        scale = 1.0 if what == "o" else max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale, err_msg=what)
        assert np.isfinite(np.asarray(a)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(5)
def test_blocks_equal_reference_with_gradients(name, kind):
    case = CASES[name]
    *operands, positions, segments, dout = draw(case)
    rest = {"positions": positions, "segments": segments, "dout": dout}
    ours, theirs = (
        run(kind, reach_of(case, kind), which, *operands, **rest) for which in ("xla", "reference")
    )
    check_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_over_groups_of_blocks_changes_nothing(kind, monkeypatch):
    """Three blocks at a time and a rest, where otherwise all go at once."""
    case = CASES["packed"]
    *operands, positions, segments, dout = draw(case)
    rest = {"positions": positions, "segments": segments, "dout": dout}
    expected = run(kind, reach_of(case, kind), "xla", *operands, **rest)
    monkeypatch.setattr(xla, "ROWS_AT_ONCE", 192 if kind == "powers" else 24)
    looped = jax.jit(functools.partial(gradients, kind, reach_of(case, kind), "xla"))
    assert "while" in looped.lower(*operands, **rest).as_text()
    check_equal(looped(*operands, **rest), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_beyond_the_length_is_dense_attention(kind):
    case = CASES["window_beyond_length"]
    *operands, positions, segments, _ = draw(case)
    ours = attend_jit(kind, reach_of(case, kind), "xla", *operands, positions, segments)
    q, k, v, _ = operands
    dense = dense_attention(q, k, v, positions, segments)
    np.testing.assert_allclose(ours, dense, atol=1e-6)


def test_equal_keys_in_each_bucket_give_dense_attention():
    """Rows of the last block, which see blocks 0..7, 8..11, 12..13 and their window 14..15; the
    values are random, so the buckets' weights and their log sizes must be right.
    """
    case = Case(documents=(128,), length=128, window_size=9)
    q, k, v, pool, positions, segments, _ = draw(case)
    first = [0, 64, 96]  # rows where the buckets of the last block begin
    bucket = np.repeat(first, [64, 32, 16])
    equal = np.concatenate([k[:, bucket], k[:, 112:]], axis=1)

    def last_rows(k):
        ours = attend_jit("summaries", (9, 8), "xla", q, k, v, pool, positions, segments)
        dense = dense_attention(q, k, v, positions, segments)
        return np.asarray(ours)[:, 120:], np.asarray(dense)[:, 120:]

    np.testing.assert_allclose(*last_rows(equal), **TOLERANCE)
    ours, dense = last_rows(k)
    assert np.abs(ours - dense).max() > 1e-2  # unequal keys are pooled, not seen


# --- Edges, reach, cost --------------------------------------------------------------------------


def seen(length: int, window_size: int, num_sink_tokens: int) -> np.ndarray:
    rows = np.arange(length)
    reach = {"window_size": window_size, "num_sink_tokens": num_sink_tokens}
    return seen_by_power_attention(rows[:, None], rows[None], **reach)


def test_edges_are_the_masks_and_those_of_pure_log_sparse():
    """Self and floor(log2 i) + 1 powers: 10,241 pairs of 1024 tokens."""
    assert num_edges(1024, 1, 0) == 10_241
    assert num_edges(1024, 1, 0) == 1024 + sum(i.bit_length() for i in range(1, 1024))
    for length, window, sinks in ((1, 1, 0), (64, 1, 0), (100, 7, 3), (130, 16, 4), (50, 90, 2)):
        edges = num_edges(length, window, sinks)
        assert edges == seen(length, window, sinks).sum()
        assert edges <= length * (window + sinks + 1 + np.log2(length))


@pytest.mark.parametrize("length", [64, 256])
def test_log2_layers_of_powers_reach_every_earlier_token_and_one_less_does_not(length):
    step = seen(length, 1, 0).astype(float)
    layers = int(np.log2(length))
    everything = np.tril(np.ones((length, length), bool))
    np.testing.assert_array_equal(np.linalg.matrix_power(step, layers) > 0, everything)
    assert (np.linalg.matrix_power(step, layers - 1) > 0).sum() < everything.sum()


def flops(function, *shapes) -> float:
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    cost = jax.jit(function).lower(*operands).cost_analysis()
    assert cost is not None
    return cost["flops"]


def shapes_of(length: int):
    wide, rows = ((1, length, 2, 32), jnp.float32), ((1, length), jnp.int32)
    return wide, wide, wide, ((2, 32), jnp.float32), rows, rows


@pytest.mark.parametrize("kind", KINDS)
def test_flops_grow_like_n_log_n_and_the_masks_like_n_squared(kind, monkeypatch):
    """Slopes of log FLOPs over log n from 512 to 4096, without a loop, whose body would be counted
    once.
    """
    monkeypatch.setattr(xla, "ROWS_AT_ONCE", 1 << 20)
    lengths = (512, 1024, 2048, 4096)
    reach = (64, 4 if kind == "powers" else 32)

    def slope(function):
        counts = [flops(function, *shapes_of(length)) for length in lengths]
        return np.polyfit(np.log(lengths), np.log(counts), 1)[0]

    def dense(q, k, v, _, positions, segments):
        return dense_attention(q, k, v, positions, segments)

    assert slope(functools.partial(attend, kind, reach, "xla")) < 1.15
    assert slope(dense) > 1.7


# --- Over a cache --------------------------------------------------------------------------------

SLOTS = 41
NEW = np.array([[*range(17, 31)], [-1, -1, *range(5, 14), -1, -1, -1]], np.int32)
"""New tokens of two rows: elsewhere in each, with padding on both sides."""


@functools.partial(jax.jit, static_argnums=0)
def cached(kind, q, k, v, pool, new, slot_positions):
    if kind == "powers":
        reach = {"window_size": 5, "num_sink_tokens": 2}
        return cached_power_attention(q, k, v, new, slot_positions, **reach)
    nodes = rebuilt(k, v, pool, 4)
    reach = {"window_size": 6, "block_size": 4}
    return cached_summary_attention(q, k, v, nodes, new, slot_positions, **reach)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [slice(None), slice(5, 6)], ids=["block", "one"])
def test_new_tokens_over_a_cache_equal_the_reference(kind, tokens, monkeypatch):
    """Rows at other positions, padding on both sides, blocks that begin inside an aligned one."""
    monkeypatch.setattr("kernels.sparse_attention.cached.MIN_BLOCK", 4)
    *operands, positions, segments, _ = draw(Case(documents=(SLOTS,), length=SLOTS))
    q, k, v, pool = operands
    reach = (5, 2) if kind == "powers" else (6, 4)
    expected = attend_jit(kind, reach, "reference", *operands, positions, segments)
    new = NEW[:, tokens]
    row = np.arange(2)[:, None]
    last = NEW.max(axis=1, keepdims=True)
    # What lies after the last token has never been written: it must not be looked at.
    slot_positions = np.where(np.arange(SLOTS)[None] <= last, np.arange(SLOTS)[None], -1)
    is_written = (slot_positions >= 0)[:, :, None, None]
    k, v = (np.where(is_written, x, np.float32(1e3)) for x in (k, v))
    out = cached(kind, q[row, new], k, v, pool, new, slot_positions.astype(np.int32))
    out, expected = np.asarray(out), np.asarray(expected)[row, new]
    np.testing.assert_allclose(out[new >= 0], expected[new >= 0], **TOLERANCE)
    assert np.isfinite(out).all()


def test_nodes_kept_token_by_token_are_those_built_at_once():
    """Whole buckets to 1e-6; two rows, one of which rests at every third step."""
    case = Case(documents=(SLOTS,), length=SLOTS)
    _, k, v, pool, *_ = draw(case)
    write = jax.jit(updated, static_argnums=5)
    nodes, second = empty_nodes((2,), SLOTS, 4, 2, 8, 8), 0
    for first in range(SLOTS):
        rests = first % 3 == 2
        positions = np.array([first, -1 if rests else second], np.int32)
        nodes = write(nodes, k, v, pool, positions, 4)
        second += not rests
    at_once = jax.jit(rebuilt, static_argnums=3)(k, v, pool, 4)
    for ours, theirs in zip(nodes, at_once, strict=True):
        assert ours.shape[1] == 10 + 5 + 2 + 1
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
        whole = [*range(second // 4), *range(10, 10 + second // 8), 15]  # of 28 tokens
        np.testing.assert_allclose(ours[1, whole], theirs[1, whole], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoded_token_costs_log_n(kind):
    """Sixteen times the slots, hardly more work: nothing of the cache's size is made."""

    def cost(slots):
        new, cache = ((1, 1, 2, 32), jnp.float32), ((1, slots, 2, 32), jnp.float32)
        rows = ((1, 1), jnp.int32), ((1, slots), jnp.int32)
        if kind == "powers":
            reach = {"window_size": 64, "num_sink_tokens": 4}
            return flops(
                functools.partial(cached_power_attention, **reach), new, cache, cache, *rows
            )
        reach = {"window_size": 64, "block_size": 32}
        nodes = jax.eval_shape(lambda: empty_nodes((1,), slots, 32, 2, 32, 32))

        def decode(q, k, v, log_weight, node_k, node_v, pool, positions, slot_positions):
            kept = type(nodes)(log_weight, node_k, node_v)
            kept = updated(kept, k, v, pool, positions[:, 0], 32)
            return cached_summary_attention(q, k, v, kept, positions, slot_positions, **reach)

        kept = [(x.shape, x.dtype) for x in nodes]
        return flops(decode, new, cache, cache, *kept, ((2, 32), jnp.float32), *rows)

    assert cost(16_384) < 1.5 * cost(1024)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, pool, positions, segments, _ = draw(CASES["one_row"])
    rows = (positions, segments)
    with pytest.raises(ValueError, match="multiple of"):
        power_attention(q[:, :, :3], k, v, *rows, window_size=4, num_sink_tokens=0)
    with pytest.raises(ValueError, match=r"must be \[B, L, H, C\]"):
        power_attention(q, k[:1], v, *rows, window_size=4, num_sink_tokens=0)
    with pytest.raises(ValueError, match="window_size=0 must be at least 1"):
        power_attention(q, k, v, *rows, window_size=0, num_sink_tokens=0)
    with pytest.raises(ValueError, match=r"pool \(1, 8\) must be"):
        summary_attention(q, k, v, pool[:1], *rows, window_size=4, block_size=4)
