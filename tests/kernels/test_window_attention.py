"""window_attention: blocks against the dense mask, and the dense mask against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.window_attention import window_attention
from kernels.window_attention.cases import CASES, Case

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 softmax and sums in another order


def draw(case: Case):
    random = np.random.RandomState(1)
    q_shape = (case.batch, case.length, case.num_heads, case.head_dim)
    kv_shape = (case.batch, case.length, case.num_kv_heads, case.head_dim)
    q, k, v, dout = (
        random.standard_normal(shape).astype(np.float32)
        for shape in (q_shape, kv_shape, kv_shape, q_shape)
    )
    positions = np.concatenate([np.arange(n) for n in case.documents]).astype(np.int32)
    segments = np.repeat(np.arange(len(case.documents)), case.documents).astype(np.int32)
    padding = case.length - len(positions)
    positions = np.pad(positions, (0, padding), constant_values=-1)
    segments = np.pad(segments, (0, padding), constant_values=len(case.documents))
    rows = [np.tile(a, (case.batch, 1)) for a in (positions, segments)]
    dout *= (positions >= 0)[None, :, None, None]
    return jax.device_put((q, k, v, *rows, dout))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="gaps")
def attend(case: Case, implementation, q, k, v, positions, segments, gaps=False):
    return window_attention(
        q,
        k,
        v,
        positions,
        segments,
        window_size=case.window_size,
        num_sink_tokens=case.num_sink_tokens,
        gaps=gaps,
        implementation=implementation,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(2)
def test_blocks_equal_reference_with_gradients(name):
    case = CASES[name]
    q, k, v, positions, segments, dout = draw(case)
    is_token = np.asarray(positions >= 0)[:, :, None, None]

    def run(implementation):
        def f(q, k, v):
            out, pull = jax.vjp(
                lambda *a: attend(case, implementation, *a, positions, segments), q, k, v
            )
            return jnp.where(is_token, out, 0.0), *pull(dout)

        return jax.jit(f)(q, k, v)

    for ours, theirs, what in zip(run("xla"), run("reference"), "oqkv", strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=what, **TOLERANCE)
        assert np.isfinite(np.asarray(ours)).all()


@pytest.mark.parametrize("form", ["gathered", "masked"])
@pytest.mark.parametrize("name", ["packed", "sinks_packed", "sinks_exceed_window"])
def test_positions_with_gaps(name, form):
    """Some of the rows, the others taken out or turned into padding between them."""
    case = CASES[name]
    q, k, v, positions, segments, _ = (np.array(a) for a in draw(case))
    is_kept = np.random.RandomState(5).rand(case.length) < 0.6
    if form == "gathered":
        q, k, v, positions, segments = (a[:, is_kept] for a in (q, k, v, positions, segments))
    else:
        positions[:, ~is_kept] = -1
    rows = (q, k, v, positions, segments)
    is_token = (positions >= 0)[:, :, None, None]
    expected = np.where(is_token, attend(case, "reference", *rows), 0.0)
    found = attend(case, "xla", *rows, gaps=True)
    np.testing.assert_allclose(np.where(is_token, found, 0.0), expected, **TOLERANCE)
    assert np.isfinite(np.asarray(found)).all()
    if (
        case.num_sink_tokens
    ):  # the wrong version: a row's place less its position is a document's start
        wrong = np.where(is_token, attend(case, "xla", *rows), 0.0)
        assert np.abs(wrong - expected).max() > 0.1


@pytest.mark.parametrize("name", ["packed", "sinks_packed", "padded", "sinks_exceed_window"])
def test_reference_is_a_loop_over_queries(name):
    case = CASES[name]
    q, k, v, positions, segments, _ = (np.asarray(a) for a in draw(case))
    out = np.asarray(attend(case, "reference", q, k, v, positions, segments))
    for i in range(0, case.length, 7):
        if positions[0, i] < 0:
            continue
        for head in range(case.num_heads):
            group = head * case.num_kv_heads // case.num_heads
            seen = [
                j
                for j in range(i + 1)
                if segments[0, j] == segments[0, i]
                and (
                    case.window_size is None
                    or positions[0, i] - positions[0, j] < case.window_size
                    or positions[0, j] < case.num_sink_tokens
                )
            ]
            scores = np.array([q[0, i, head] @ k[0, j, group] for j in seen]) / case.head_dim**0.5
            weights = np.exp(scores - scores.max())
            expected = (weights / weights.sum()) @ v[0, seen, group]
            np.testing.assert_allclose(out[0, i, head], expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["sinks_packed", "causal"])
def test_scores_with_a_bound(name):
    """Of a loop over queries; kernels that have none refuse."""
    case, cap = CASES[name], 0.6
    q, k, v, positions, segments, _ = (np.asarray(a) for a in draw(case))
    form = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}
    bounded = functools.partial(window_attention, **form, score_cap=cap)
    rows = (q, k, v, positions, segments)
    out = np.asarray(jax.jit(functools.partial(bounded, implementation="auto"))(*rows))
    theirs = jax.jit(functools.partial(bounded, implementation="reference"))(*rows)
    is_token = (positions >= 0)[:, :, None, None]
    np.testing.assert_allclose(np.where(is_token, out - theirs, 0.0), 0.0, atol=1e-5)
    for i in range(0, case.length, 7):
        before = np.arange(i + 1)
        seen = before[segments[0, before] == segments[0, i]]
        distance = positions[0, i] - positions[0, seen]
        is_near = distance < (case.window_size or case.length)
        seen = seen[is_near | (positions[0, seen] < case.num_sink_tokens)]
        scores = k[0, seen, 0] @ q[0, i, 0] / case.head_dim**0.5
        weights = np.exp(cap * np.tanh(scores / cap))
        expected = (weights / weights.sum()) @ v[0, seen, 0]
        np.testing.assert_allclose(out[0, i, 0], expected, **TOLERANCE)
    for implementation in ("cpu", "triton", "mosaic"):
        with pytest.raises(NotImplementedError, match=r"does not cap scores \(score_cap=0\.6\)"):
            bounded(*rows, implementation=implementation)


def test_a_window_beyond_the_length_is_no_window():
    case = CASES["window_beyond_length"]
    q, k, v, positions, segments, _ = draw(case)
    windowed = attend(case, "xla", q, k, v, positions, segments)
    open_case = Case(length=case.length, documents=case.documents)
    np.testing.assert_array_equal(windowed, attend(open_case, "xla", q, k, v, positions, segments))


def test_what_lies_outside_the_window_changes_nothing_and_its_edge_does():
    case = CASES["window"]
    q, k, v, positions, segments, _ = draw(case)
    out = attend(case, "xla", q, k, v, positions, segments)
    assert case.window_size is not None
    query = 200
    edge = query - case.window_size + 1
    beyond = attend(case, "xla", q, k.at[:, edge - 1].add(1.0), v, positions, segments)
    at_edge = attend(case, "xla", q, k.at[:, edge].add(1.0), v, positions, segments)
    np.testing.assert_array_equal(beyond[:, query], out[:, query])
    assert np.abs(np.asarray(at_edge - out))[:, query].max() > 1e-4


def test_head_counts_that_do_not_divide_are_refused():
    case = CASES["causal"]
    q, k, v, positions, segments, _ = draw(case)
    with pytest.raises(ValueError, match="multiple of"):
        attend(case, "auto", q[:, :, :3], k, v, positions, segments)
    with pytest.raises(ValueError, match=r"must be \[B, L, H, C\]"):
        attend(case, "auto", q, k[:, 1:], v, positions, segments)


# --- Learned sink logits -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinks_packed", "padded"])
def test_learned_sinks_of_blocks_equal_the_reference_with_gradients(name):
    case = CASES[name]
    q, k, v, positions, segments, dout = draw(case)
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0])

    def run(implementation):
        def forward(q, k, v, sinks):
            out = window_attention(
                q,
                k,
                v,
                positions,
                segments,
                window_size=case.window_size,
                num_sink_tokens=case.num_sink_tokens,
                sink_logits_H=sinks,
                implementation=implementation,
            )
            return jnp.where((positions >= 0)[:, :, None, None], out, 0.0)

        def f(*operands):
            out, pull = jax.vjp(forward, *operands)
            return out, *pull(dout)

        return jax.jit(f)(q, k, v, sinks)

    for ours, theirs, what in zip(run("xla"), run("reference"), "oqkvb", strict=True):
        # A sink's gradient sums over all rows: its error is that of its largest entry.
        scale = max(float(jnp.abs(theirs).max()), 1.0) if what == "b" else 1.0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=what)
        assert np.isfinite(np.asarray(ours)).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_sink_at_minus_infinity_takes_nothing(implementation):
    """And leaves the ordinary softmax, to float32's rounding of its sum."""
    q, k, v, positions, segments, _ = draw(CASES["causal"])

    @jax.jit
    def run(q, k, v, sinks):
        reach = {"window_size": 20, "num_sink_tokens": 0, "implementation": implementation}
        return window_attention(q, k, v, positions, segments, sink_logits_H=sinks, **reach)

    plain = run(q, k, v, None)
    for lowest in (-1e30, -jnp.inf):
        np.testing.assert_allclose(run(q, k, v, jnp.full(4, lowest)), plain, atol=1e-6)
    assert np.abs(np.asarray(run(q, k, v, jnp.zeros(4)) - plain)).max() > 1e-2


def test_one_sink_per_query_head_is_needed():
    case = CASES["one_row"]
    q, k, v, positions, segments, _ = draw(case)
    reach = {"window_size": None, "num_sink_tokens": 0}
    with pytest.raises(ValueError, match=r"\(2,\) must be one per query head, \(4,\)"):
        window_attention(q, k, v, positions, segments, sink_logits_H=jnp.zeros(2), **reach)
