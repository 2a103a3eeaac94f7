"""grouped_matmul: every implementation against the reference, and the reference against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.cases import CASES, Case
from kernels.grouped_matmul.xla import tile_rows

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of at most 300 terms in another order


@functools.partial(jax.jit, static_argnums=3)
def multiply(x, w, sizes, implementation):
    return grouped_matmul(x, w, sizes, implementation=implementation)


def draw(case: Case, dtype=jnp.float32):
    random = np.random.RandomState(0)

    def normal(*shape):
        return jax.device_put(random.standard_normal(shape).astype(dtype))

    x = normal(case.rows, case.d_in)
    w = normal(len(case.group_sizes), case.d_in, case.d_out)
    dy = random.standard_normal((case.rows, case.d_out)).astype(dtype)
    used = sum(case.group_sizes)
    dy[used:] = 0
    return x, w, np.array(case.group_sizes, np.int32), jax.device_put(dy), used


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(2)
def test_reference_is_a_loop_over_groups(name):
    x, w, sizes, _, used = draw(CASES[name])
    y = multiply(x, w, sizes, "reference")
    start = 0
    for e, size in enumerate(CASES[name].group_sizes):
        rows = slice(start, start + size)
        expected = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[e]
        np.testing.assert_allclose(np.asarray(y)[rows], expected, **TOLERANCE)
        start += size
    np.testing.assert_array_equal(np.asarray(y)[used:], 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(2)
def test_xla_equals_reference_with_gradients(name):
    x, w, sizes, dy, used = draw(CASES[name])

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        y, pull = jax.vjp(lambda *a: multiply(*a, sizes, implementation), x, w)
        return y[:used], *pull(dy)

    for ours, theirs, what in zip(run("xla"), run("reference"), ("y", "dx", "dw"), strict=True):
        np.testing.assert_allclose(ours, theirs, err_msg=what, **TOLERANCE)


def test_unused_rows_are_finite_and_pass_no_gradient_into_weights():
    x, w, sizes, _, used = draw(CASES["rows_past_the_end"])
    y = multiply(x, w, sizes, "xla")
    assert np.isfinite(np.asarray(y)).all()
    _, pull = jax.vjp(lambda w: multiply(x, w, sizes, "xla"), w)
    garbage = jnp.zeros_like(y).at[used:].set(1e6)
    np.testing.assert_array_equal(pull(garbage)[0], 0)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 30))
@pytest.mark.slow
def test_any_group_sizes(group_sizes, spare):
    rows = max(sum(group_sizes) + spare, 1)
    case = Case(rows=rows, d_in=4, d_out=6, group_sizes=tuple(group_sizes))
    x, w, sizes, _, used = draw(case)
    ours = multiply(x, w, sizes, "xla")[:used]
    theirs = multiply(x, w, sizes, "reference")[:used]
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_bfloat16_sums_in_float32():
    x, w, sizes, _, used = draw(CASES["skewed"], jnp.bfloat16)
    ours = multiply(x, w, sizes, "xla")
    exact = multiply(x.astype(jnp.float32), w.astype(jnp.float32), sizes, "reference")
    assert ours.dtype == jnp.bfloat16
    # One rounding of the result to 8 bits of mantissa.
    np.testing.assert_allclose(
        ours[:used].astype(jnp.float32), exact[:used], rtol=2**-8, atol=2**-8
    )


def test_work_follows_the_groups_not_their_number():
    """A wrong version that ran every row through every expert would pass all tests above."""
    assert tile_rows(4096, 8) == 128
    assert tile_rows(4096, 128) == 32
    assert tile_rows(10, 64) == 16


def test_a_version_that_ignores_group_borders_is_rejected():
    x, w, sizes, _, used = draw(CASES["skewed"])
    rounded = (sizes + 15) // 16 * 16  # groups moved to tile borders
    wrong = multiply(x, w, rounded, "xla")[:used]
    right = multiply(x, w, sizes, "reference")[:used]
    assert not np.allclose(wrong, right, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, s: (x[:, :-1], w, s), "same D"),
        (lambda x, w, s: (x, w, s[:-1]), "one entry per matrix"),
        (lambda x, w, s: (x.astype(jnp.bfloat16), w, s), "cast one"),
        (lambda x, w, s: (x, w, s.astype(jnp.float32)), "integers"),
    ],
)
def test_what_does_not_fit_is_said(change, sentence):
    x, w, sizes, _, _ = draw(CASES["balanced"])
    with pytest.raises(ValueError, match=sentence):
        grouped_matmul(*change(x, w, sizes))


def test_a_gate_far_below_zero_has_a_gradient_of_zero():
    """exp(-gate) overflows there, and the formula's own derivative is 0 * inf."""
    x, w = jnp.ones((1, 1)), jnp.array([[[-200.0, 3.0]]])
    gradient = jax.grad(lambda x: grouped_swiglu(x, w, jnp.array([1])).sum())(x)
    np.testing.assert_array_equal(gradient, [[0.0]])
