"""paged_attention: pages against dense attention, and the Triton kernel in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.backend import INTERPRET
from kernels.paged_attention import paged_attention, pallas_triton
from kernels.paged_attention.cases import CASES, Case
from kernels.window_attention import window_attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 softmax in base 2, sums in another order


def draw(case: Case):
    """Operands, and the keys and values as dense arrays [B, L, G, C]."""
    random = np.random.RandomState(11)
    size, pages = case.page_size, -(-max(case.lengths) // case.page_size)
    batch, kv_heads, width = len(case.lengths), case.num_kv_heads, case.head_dim
    q = random.randn(batch, case.num_heads, width).astype(np.float32)
    k, v = random.randn(2, batch, pages * size, kv_heads, width).astype(np.float32)
    # Pages lie anywhere; what no sequence has written, and page 0, is not to be looked at.
    tables = 1 + random.permutation(batch * pages).reshape(batch, pages)
    pools = np.full((2, 1 + batch * pages, size, kv_heads, width), np.nan, np.float32)
    for b, length in enumerate(case.lengths):
        for p in range(length):
            pools[:, tables[b, p // size], p % size] = k[b, p], v[b, p]
        tables[b, -(-length // size) :] = 0
    lengths = np.array(case.lengths, np.int32)
    return (q, *pools, tables.astype(np.int32), lengths), (k, v)


def reach_of(case: Case):
    return {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}


def dense(case: Case, q, k, v, sinks=None):
    """The last row of each sequence's attention over itself."""
    out = np.zeros_like(q)
    for b, length in enumerate(case.lengths):
        if length == 0:
            continue
        queries = np.zeros((1, length, *q.shape[1:]), np.float32)
        queries[0, -1] = q[b]
        position = np.arange(length, dtype=np.int32)[None]
        rows = (queries, k[b : b + 1, :length], v[b : b + 1, :length], position, sinks)
        out[b] = np.asarray(reference(*rows, **reach_of(case)))[0, -1]
    return out


@functools.partial(jax.jit, static_argnames=("window_size", "num_sink_tokens"))
def reference(q, k, v, positions, sinks, window_size, num_sink_tokens):
    return window_attention(
        q,
        k,
        v,
        positions,
        0 * positions,
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        sink_logits_H=sinks,
        implementation="reference",
    )


xla = functools.partial(paged_attention, implementation="xla")
interpreted = functools.partial(pallas_triton.paged_attention, target=INTERPRET)


@pytest.mark.parametrize("function", [xla, interpreted], ids=["xla", "triton"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(2)
def test_pages_equal_dense_attention(name, function):
    case = CASES[name]
    operands, (k, v) = draw(case)
    found = jax.jit(functools.partial(function, **reach_of(case)))(*operands)
    np.testing.assert_allclose(found, dense(case, operands[0], k, v), **TOLERANCE)


@pytest.mark.parametrize("function", [xla, interpreted], ids=["xla", "triton"])
def test_learned_sinks(function):
    case = CASES["sinks"]
    operands, (k, v) = draw(case)
    sinks = jnp.asarray([-jnp.inf, -1.0, 0.0, 1.0, 2.0, 4.0])
    found = jax.jit(functools.partial(function, sink_logits_H=sinks, **reach_of(case)))(*operands)
    np.testing.assert_allclose(found, dense(case, operands[0], k, v, sinks), **TOLERANCE)


def test_the_number_of_programs_changes_nothing(monkeypatch):
    case = CASES["sinks"]
    operands, (k, v) = draw(case)
    expected = dense(case, operands[0], k, v)
    for parts in (1, 4):  # of 3 sequences, 2 heads and at most 6 pages
        monkeypatch.setattr(pallas_triton, "PROGRAMS", parts * 6)
        found = jax.jit(functools.partial(interpreted, **reach_of(case)))(*operands)
        np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_a_version_that_reads_the_page_before_is_rejected():
    case = CASES["window"]
    (q, k, v, tables, lengths), dense_kv = draw(case)
    function = jax.jit(functools.partial(interpreted, **reach_of(case)))
    wrong = function(q, k, v, np.roll(tables, 1, axis=1), lengths)
    assert not np.allclose(wrong[0], dense(case, q, *dense_kv)[0], atol=1e-2)


def test_what_does_not_fit_is_said():
    (q, k, v, tables, lengths), _ = draw(CASES["multi_query"])
    with pytest.raises(ValueError, match=r"must be \[B, H, C\]"):
        paged_attention(q, k, v[:, :8], tables, lengths)
    with pytest.raises(ValueError, match="6 query heads must be a multiple of 4"):
        paged_attention(q, *(np.repeat(x, 4, axis=2) for x in (k, v)), tables, lengths)
    with pytest.raises(ValueError, match=r"lengths \(1,\) must be"):
        paged_attention(q, k, v, tables, lengths[:1])
    small_pages = functools.partial(interpreted, window_size=None, num_sink_tokens=0)
    with pytest.raises(NotImplementedError, match="page_size=8 must be a power of two from 16"):
        small_pages(q, k[:, :8], v[:, :8], tables, lengths)
    with pytest.raises(NotImplementedError, match="the default device is cpu"):
        paged_attention(q, k, v, tables, lengths, implementation="triton")
