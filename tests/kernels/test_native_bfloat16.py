"""Products of bfloat16 operands by the native kernels, against numpy in float64.

What is compared are products of the same rounded operands: what is left is the order of float32
sums, and the rounding of the result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import native
from kernels.grouped_matmul import cpu
from kernels.grouped_matmul.cases import CASES, Case

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)

EDGES = {
    # Depths of more than one block (512), rows of more than one task (128), widths of no tile.
    "rows": Case(rows=300, d_in=40, d_out=70, group_sizes=(161, 0, 13, 126)),
    "deep": Case(rows=70, d_in=1057, d_out=33, group_sizes=(37, 33)),
    "long_groups": Case(rows=1100, d_in=33, d_out=65, group_sizes=(1030, 64)),
    "odd": Case(rows=3, d_in=1, d_out=1, group_sizes=(1, 2)),
    "nothing": Case(rows=3, d_in=4, d_out=5, group_sizes=(0, 0)),
    "wide": Case(rows=20, d_in=70, d_out=1100, group_sizes=(12, 8)),
}


# One program for each shape: operation by operation there would be several.
rows_times_matrix = jax.jit(cpu.rows_times_matrix, static_argnames=("transpose", "dtype"))
rows_times_rows = jax.jit(cpu.rows_times_rows, static_argnames="dtype")


def halves(random, *shape):
    return random.standard_normal(shape).astype(jnp.bfloat16)


def exact(array):
    return np.asarray(array).astype(jnp.bfloat16).astype(np.float64)


def check(ours, left, right):
    """Of a sum of K products float32 errs by K 2^-24 of their absolute sum at most, its result in
    bfloat16 by 2^-8 of itself."""
    expected = left @ right
    bound = left.shape[1] * 2.0**-24 * (np.abs(left) @ np.abs(right))
    if ours.dtype == jnp.bfloat16:
        bound = bound + 2.0**-8 * np.abs(expected)
    error = np.abs(np.asarray(ours, np.float64) - expected)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("name", CASES | EDGES)
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.thinned(6)
def test_contractions_are_loops_over_groups(name, weights, isa_or_tiles):
    case = (CASES | EDGES)[name]
    random = np.random.RandomState(0)
    x, dy = halves(random, case.rows, case.d_in), halves(random, case.rows, case.d_out)
    shape = (len(case.group_sizes), case.d_in, case.d_out)
    w = random.standard_normal(shape).astype(jnp.dtype(weights))
    sizes = np.array(case.group_sizes, np.int32)
    result = jnp.float32 if weights == "float32" else None
    y = np.asarray(rows_times_matrix(x, w, sizes, transpose=False, dtype=result))
    dx = np.asarray(rows_times_matrix(dy, w, sizes, transpose=True, dtype=result))
    dw = np.asarray(rows_times_rows(x, dy, sizes, dtype=result))
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(weights)}
    ends = np.cumsum(case.group_sizes)
    for e, (end, size) in enumerate(zip(ends, case.group_sizes, strict=True)):
        rows = slice(end - size, end)
        check(y[rows], exact(x[rows]), exact(w[e]))
        check(dx[rows], exact(dy[rows]), exact(w[e]).T)
        check(dw[e], exact(x[rows]).T, exact(dy[rows]))
    np.testing.assert_array_equal(y[ends[-1] :].astype(np.float32), 0)
    np.testing.assert_array_equal(dx[ends[-1] :].astype(np.float32), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_what_is_not_finite_stays_so_and_in_its_row(value, weights, isa_or_tiles):
    random = np.random.RandomState(1)
    w = random.standard_normal((1, 45, 19)).astype(jnp.dtype(weights))
    x, sizes = halves(random, 37, 45), np.array([37], np.int32)
    spoilt_x, spoilt_w = x.copy(), w.copy()
    spoilt_x[36, 44] = spoilt_w[0, 44, 18] = value
    clean = np.asarray(rows_times_matrix(x, w, sizes, transpose=False), np.float32)
    y = np.asarray(rows_times_matrix(spoilt_x, w, sizes, transpose=False), np.float32)
    np.testing.assert_array_equal(y[:36], clean[:36])
    expected = value * np.sign(np.asarray(w[0, 44], np.float32))
    np.testing.assert_array_equal(y[36], expected)
    y = np.asarray(rows_times_matrix(x, spoilt_w, sizes, transpose=False), np.float32)
    np.testing.assert_array_equal(y[:, :18], clean[:, :18])
    np.testing.assert_array_equal(y[:, 18], value * np.sign(np.asarray(x[:, 44], np.float32)))


def test_a_row_has_the_same_bits_whatever_rows_there_are(isa_or_tiles):
    random = np.random.RandomState(2)
    x, w = halves(random, 150, 600), halves(random, 2, 600, 64)
    sizes = [np.array(s, np.int32) for s in ([40, 110], [0, 7])]
    together = np.asarray(rows_times_matrix(x, w, sizes[0], transpose=False), np.float32)
    alone = np.asarray(rows_times_matrix(x[40:47], w, sizes[1], transpose=False), np.float32)
    np.testing.assert_array_equal(together[40:47], alone)


def test_several_callers_pack_matrices_of_their_own():
    """Strips of columns that a thread keeps are those of one call."""
    random = np.random.RandomState(3)
    x, w = halves(random, 300, 64), halves(random, 6, 64, 96)
    sizes = np.array([300], np.int32)
    product = jax.jit(lambda x, w: cpu.rows_times_matrix(x, w, sizes, transpose=False))
    everywhere = [
        (jax.device_put(x, device), jax.device_put(w[i % 6][None], device), i % 6)
        for i, device in enumerate(jax.devices() * 4)
    ]
    results = [(product(x, w), i) for x, w, i in everywhere]
    for y, i in results:
        check(y, exact(x), exact(w[i]))
