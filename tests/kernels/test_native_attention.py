"""The native attention, on every instruction set of this machine, against the dense definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.window_attention import window_attention
from kernels.window_attention.cases import CASES, Case

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 exponentials and sums in another order

NATIVE_CASES = {
    # Odd widths, more keys than a chunk (96), heads that share a panel of queries with their rows.
    "odd_widths": Case(length=131, documents=(131,), num_heads=6, num_kv_heads=2, head_dim=17),
    "one_group_of_many_heads": Case(length=37, documents=(37,), num_heads=40, num_kv_heads=1),
    "many_chunks": Case(
        batch=1, length=500, documents=(7, 480, 13), window_size=150, num_sink_tokens=5
    ),
    "sinks_far_behind": Case(
        batch=1, length=400, documents=(400,), window_size=9, num_sink_tokens=30
    ),
}


def draw(case: Case, value_width=None, seed=0):
    random = np.random.RandomState(seed)
    shape = (case.batch, case.length)
    value_width = value_width or case.head_dim
    q, k, v, dout = (
        random.standard_normal((*shape, heads, width)).astype(np.float32)
        for heads, width in (
            (case.num_heads, case.head_dim),
            (case.num_kv_heads, case.head_dim),
            (case.num_kv_heads, value_width),
            (case.num_heads, value_width),
        )
    )
    used = sum(case.documents)
    positions = np.full(case.length, -1, np.int32)
    positions[:used] = np.concatenate([np.arange(n) for n in case.documents])
    segments = np.full(case.length, len(case.documents), np.int32)
    segments[:used] = np.repeat(np.arange(len(case.documents)), case.documents)
    rows = [np.broadcast_to(x, shape) for x in (positions, segments)]
    sinks = random.standard_normal(case.num_heads).astype(np.float32)
    return jax.device_put((q, k, v, *rows, sinks, dout))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def pulled(case: Case, implementation, gaps, has_sinks, q, k, v, positions, segments, sinks, dout):
    """The attention of tokens and the gradients of q, k, v and the sinks."""

    def attend(q, k, v, sinks):
        out = window_attention(
            q,
            k,
            v,
            positions,
            segments,
            window_size=case.window_size,
            num_sink_tokens=case.num_sink_tokens,
            sink_logits_H=sinks if has_sinks else None,
            gaps=gaps,
            implementation=implementation,
        )
        return jnp.where((positions >= 0)[:, :, None, None], out, 0.0)

    out, pull = jax.vjp(attend, q, k, v, sinks)
    return out, *pull(dout)


def check(case: Case, operands, *, gaps=False, has_sinks=False):
    ours = pulled(case, "cpu", gaps, has_sinks, *operands)
    theirs = pulled(case, "reference", gaps, has_sinks, *operands)
    for found, expected, what in zip(ours, theirs, ("out", "q", "k", "v", "sinks"), strict=True):
        np.testing.assert_allclose(found, expected, err_msg=what, **TOLERANCE)


@pytest.mark.parametrize("name", CASES | NATIVE_CASES)
@pytest.mark.thinned(6)
def test_equals_the_definition_with_gradients(name, isa):
    case = (CASES | NATIVE_CASES)[name]
    check(case, draw(case))


@pytest.mark.parametrize("name", ["packed", "sinks_packed", "padded", "one_group_of_many_heads"])
def test_learned_sinks_take_their_share_with_gradients(name, isa):
    case = (CASES | NATIVE_CASES)[name]
    check(case, draw(case), has_sinks=True)


@pytest.mark.parametrize("value_width", [5, 48])
def test_values_of_another_width(value_width, isa):
    case = CASES["packed"]
    check(case, draw(case, value_width))


@pytest.mark.parametrize("name", ["packed", "sinks_packed", "sinks_exceed_window"])
def test_positions_with_gaps(name):
    case = CASES[name]
    q, k, v, positions, segments, sinks, dout = draw(case)
    is_kept = np.random.RandomState(5).rand(case.length) < 0.6
    masked = jnp.where(is_kept[None], positions, -1)
    check(case, (q, k, v, masked, segments, sinks, dout), gaps=True)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 90)),
    st.integers(0, 6),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
)
@pytest.mark.slow
def test_any_documents_and_windows(documents, padding, window, sinks, heads):
    case = Case(
        batch=1,
        length=sum(documents) + padding,
        documents=tuple(documents),
        window_size=window,
        num_sink_tokens=sinks if window else 0,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=8,
    )
    check(case, draw(case))


def test_large_scores_neither_overflow_nor_lose_the_largest():
    case = CASES["causal"]
    q, k, v, *rest = draw(case)
    check(case, (q * 30, k * 30, v, *rest[:-1], rest[-1] * 1e-3))


def test_padding_gets_zero_whatever_lies_there(isa):
    """Rows of padding at the front, in the middle and at the end."""
    case = Case(length=60, documents=(60,))
    q, k, v, positions, segments, _, _ = draw(case)
    is_padding = np.zeros(60, bool)
    is_padding[[0, 1, 30, 31, 58, 59]] = True
    positions = jnp.where(is_padding[None], -1, positions)
    out = window_attention(
        q,
        k,
        v,
        positions,
        segments,
        window_size=None,
        num_sink_tokens=0,
        gaps=True,
        implementation="cpu",
    )
    np.testing.assert_array_equal(out[:, is_padding], 0)
    assert np.isfinite(np.asarray(out)).all()


def test_the_future_changes_nothing_before_it(isa):
    case = CASES["sinks_packed"]
    q, k, v, positions, segments, _, _ = draw(case)
    attend = functools.partial(
        window_attention, window_size=33, num_sink_tokens=4, implementation="cpu"
    )
    at = 150
    before = attend(q, k, v, positions, segments)[:, :at]
    noise = [x.at[:, at:].add(1.0) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(*noise, positions, segments)[:, :at], before)


def test_a_version_that_forgets_the_scale_is_rejected():
    case = CASES["causal"]
    operands = draw(case)
    wrong = pulled(case, "cpu", False, False, operands[0] * case.head_dim**0.5, *operands[1:])
    right = pulled(case, "reference", False, False, *operands)
    assert not np.allclose(wrong[0], right[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["packed", "sinks_packed", "odd_widths"])
def test_bfloat16_is_float32_inside(name):
    """What is rounded are q, k, v, the attention and its gradients; nothing between."""
    case = (CASES | NATIVE_CASES)[name]
    operands = draw(case)
    rounded = [x.astype(jnp.bfloat16) for x in operands[:3]]
    d_out = operands[6].astype(jnp.bfloat16)
    ours = pulled(case, "cpu", False, True, *rounded, *operands[3:6], d_out)
    widened = [x.astype(jnp.float32) for x in rounded]
    floats = d_out.astype(jnp.float32)
    theirs = pulled(case, "reference", False, True, *widened, *operands[3:6], floats)
    assert [x.dtype for x in ours] == [jnp.bfloat16] * 4 + [jnp.float32]
    for mine, exact in zip(ours, theirs, strict=True):
        # The rounded attention also enters each gradient, by its sum with that of the attention.
        largest = np.abs(exact).max()
        np.testing.assert_allclose(
            mine.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8 * largest
        )


def test_float16_is_said_to_be_missing():
    case = CASES["causal"]
    q, k, v, positions, segments, _, _ = draw(case)
    q, k, v = (x.astype(jnp.float16) for x in (q, k, v))
    attend = functools.partial(
        window_attention, q, k, v, positions, segments, window_size=None, num_sink_tokens=0
    )
    with pytest.raises(NotImplementedError, match="attend in float32 or bfloat16"):
        attend(implementation="cpu")
    assert jax.jit(attend)().dtype == jnp.float16


def test_the_platform_is_chosen_when_the_program_is_lowered():
    case = CASES["sinks"]
    q, k, v, positions, segments, _, _ = draw(case)

    def loss(q):
        return window_attention(
            q, k, v, positions, segments, window_size=50, num_sink_tokens=4
        ).sum()

    traced = jax.jit(jax.grad(loss)).trace(q)
    assert "moesaic_attention_backward" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()
