"""grouped_matmul's Triton kernels in Pallas' interpreter, against the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import H100, INTERPRET, Target, require_triton
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu, pallas_triton
from kernels.grouped_matmul.cases import CASES, Case
from kernels.grouped_matmul.tiles import Tiles, choose_tiles, place, tile_table

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of at most 300 terms in another order


def draw(case: Case, dtype=jnp.float32, widths: int = 1):
    """Operands of a case, with `widths` times its columns of weights."""
    random = np.random.RandomState(2)
    x = random.randn(case.rows, case.d_in)
    shape = (len(case.group_sizes), case.d_in, case.d_out * widths)
    w = random.randn(*shape)
    used = sum(case.group_sizes)
    dy = np.where((np.arange(case.rows) < used)[:, None], random.randn(case.rows, case.d_out), 0)
    x, w, dy = (a.astype(dtype) for a in (x, w, dy))
    return *jax.device_put((x, w, np.array(case.group_sizes, np.int32), dy)), used


def run(function, x, w, sizes, dy, used):
    """The rows that groups own, and the gradients of x and w."""
    y, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
    return y[:used], *pull(dy)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compare(function, reference, x, w, sizes, dy):
    """Both, as one program."""
    used = len(x)
    return run(function, x, w, sizes, dy, used), run(reference, x, w, sizes, dy, used)


interpreted = functools.partial(pallas_triton.grouped_matmul, target=INTERPRET)
reference = jax.jit(functools.partial(grouped_matmul, implementation="reference"))
FAST = ("empty_groups", "one_hot_group", "rows_past_the_end", "tile_edges")
"""The others run after `make test`: four kernels and a reference take seconds to compile."""
TILES = Tiles(rows=16, columns=16, depth=16)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_kernels_equal_reference_with_gradients(name):
    """The reference gives zero past the last group too, and what is not written would be NaN."""
    x, w, sizes, dy, _ = draw(CASES[name])
    ours, theirs = compare(interpreted, reference, x, w, sizes, dy)
    for a, b, what in zip(ours, theirs, ("y", "dx", "dw"), strict=True):
        np.testing.assert_allclose(a, b, err_msg=what, **TOLERANCE)


def test_a_gradient_in_strips_is_the_same(monkeypatch):
    """Two rows of four blocks: strips of three, and the last of one."""
    x, _, sizes, dy, _ = draw(Case(rows=40, d_in=40, d_out=128, group_sizes=(17, 20)))
    plan = pallas_triton.Plan(INTERPRET, None)
    whole = pallas_triton._rows_times_rows(plan, x, dy, sizes)
    seen = []

    def three(*shape):
        seen.append(shape)
        return 3

    monkeypatch.setattr(pallas_triton, "columns_of_strip", three)
    np.testing.assert_array_equal(pallas_triton._rows_times_rows(plan, x, dy, sizes), whole)
    assert seen


def test_bfloat16_sums_in_float32():
    x, w, sizes, _, _ = draw(CASES["skewed"], jnp.bfloat16)
    ours = jax.jit(interpreted)(x, w, sizes)
    exact = reference(x.astype(jnp.float32), w.astype(jnp.float32), sizes)
    assert ours.dtype == jnp.bfloat16
    # One rounding of the result to 8 bits of mantissa.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8)


def test_no_tile_is_read_beyond_its_group():
    """Infinite rows and matrices of other groups, and unused rows, leave a group's result alone."""
    case = Case(rows=60, d_in=8, d_out=24, group_sizes=(13, 20, 11))
    x, w, sizes, dy, used = draw(case)
    clean, _ = compare(interpreted, reference, x, w, sizes, dy)
    is_other = ((np.arange(60) < 13) | (np.arange(60) >= 33))[:, None]
    x, dy = (np.where(is_other, np.float32(np.inf), a) for a in (x, dy))
    w = np.array(w)
    w[[0, 2]] = np.nan
    y, dx, dw = map(np.asarray, run(jax.jit(interpreted), x, w, sizes, dy, used))
    clean = list(map(np.asarray, clean))
    np.testing.assert_array_equal(y[13:33], clean[0][13:33])
    np.testing.assert_array_equal(dx[13:33], clean[1][13:33])
    np.testing.assert_array_equal(dw[1], clean[2][1])


def test_a_version_that_ignores_group_borders_is_rejected():
    x, w, sizes, _, used = draw(CASES["skewed"])
    rounded = (sizes + 15) // 16 * 16  # groups moved to tile borders
    wrong = jax.jit(interpreted)(x, w, rounded)[:used]
    assert not np.allclose(wrong, reference(x, w, sizes)[:used], **TOLERANCE)


# --- Gate, up and gathered rows ------------------------------------------------------------------


def swiglu_by_hand(x, w, sizes, rows=None):
    """The reference's product of sorted rows, and the formula in numpy's terms."""
    h = reference(x if rows is None else x[rows], w, sizes)
    gate, up = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return gate * (1 / (1 + jnp.exp(-gate))) * up


@pytest.mark.parametrize("is_gathered", [False, True])
def test_gate_and_up_in_one_kernel(is_gathered):
    """Of 24 columns each, which no block divides; gathered, a token is two or three rows."""
    case = Case(rows=50, d_in=16, d_out=24, group_sizes=(10, 0, 31))
    x, w, sizes, dy, _ = draw(case, widths=2)
    rows = None
    if is_gathered:
        rows = jnp.asarray(np.random.RandomState(3).permutation(case.rows) % 20, jnp.int32)
        x = x[:20]
    fused = functools.partial(pallas_triton.grouped_swiglu, rows_R=rows, target=INTERPRET)
    by_hand = functools.partial(swiglu_by_hand, rows=rows)
    ours, theirs = (run(jax.jit(f), x, w, sizes, dy, case.rows) for f in (fused, by_hand))
    for a, b, what in zip(ours, theirs, ("y", "dx", "dw"), strict=True):
        np.testing.assert_allclose(a, b, err_msg=what, rtol=1e-5, atol=1e-4)
    wrong = jax.jit(fused)(x, jnp.roll(w, case.d_out, axis=2), sizes)  # up first
    assert not np.allclose(wrong, theirs[0], atol=1e-2)


def test_without_a_gpu_the_op_is_its_parts():
    x, w, sizes, _, used = draw(CASES["skewed"], widths=2)
    rows = jnp.arange(len(x), dtype=jnp.int32)[::-1]
    ours = jax.jit(grouped_swiglu)(x, w, sizes, rows_R=rows)
    np.testing.assert_allclose(ours[:used], swiglu_by_hand(x, w, sizes, rows)[:used], **TOLERANCE)


# --- Tiles ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=5, max_size=5), st.just(230), st.sampled_from([1, 8]))
def test_every_row_lies_in_one_tile_of_its_group(group_sizes, rows, alignment):
    table = jax.jit(tile_table, static_argnums=(1, 2, 3, 4))(
        np.array(group_sizes, np.int32), rows, TILES, 64, alignment
    )
    owner = np.repeat(np.arange(len(group_sizes) + 1), [*group_sizes, rows - sum(group_sizes)])
    seen = np.zeros(rows, int)
    for group, first, end in zip(*(np.asarray(a) for a in table[:3]), strict=True):
        assert end - (first - first % alignment) <= 16
        if end > first:
            seen[first:end] += 1
            np.testing.assert_array_equal(owner[first:end], group)
    np.testing.assert_array_equal(seen, 1)


@pytest.mark.parametrize("columns", [1, 3])
def test_tiles_of_a_group_sweep_over_the_columns_together(columns, monkeypatch):
    """Groups of 1, 0 and 5 tiles and two rows of no group, in sweeps of up to 3 tiles."""
    monkeypatch.setattr("kernels.grouped_matmul.tiles.SWEEP_BYTES", 3 * 16 * 64)
    table = tile_table(jnp.asarray([16, 0, 70], jnp.int32), 88, TILES, 64)
    programs = jnp.arange(len(table.group_P) * columns, dtype=jnp.int32)
    at = jax.vmap(lambda program: place(program, table, columns))(programs)
    visited = [(int(row), int(c)) for row, c in zip(at.first_row, at.column, strict=True)]
    sweeps = [[0], [16, 32, 48], [64, 80], [86]]
    expected = [(row, c) for sweep in sweeps for c in range(columns) for row in sweep]
    assert visited[: len(expected)] == expected
    assert (np.asarray(at.first_row) == 88)[len(expected) :].all()


def test_tiles_fit_what_there_is_to_do():
    assert choose_tiles(8, 2048, 1408, target=H100).rows == 16
    assert choose_tiles(1024, 2048, 1408, target=H100).rows == 128
    small = choose_tiles(1024, 24, 40, target=H100)
    assert (small.columns, small.depth) == (64, 32)


def test_other_tiles_change_nothing():
    x, w, sizes, _, _ = draw(CASES["tile_edges"])
    tiles = Tiles(rows=32, columns=16, depth=16)
    ours = jax.jit(functools.partial(interpreted, tiles=tiles))(x, w, sizes)
    np.testing.assert_allclose(ours, reference(x, w, sizes), **TOLERANCE)


# --- Choice --------------------------------------------------------------------------------------


def test_what_cannot_run_is_refused_by_name_and_left_out_by_auto():
    x, w, sizes, _, _ = draw(CASES["balanced"])
    for op, weight in ((grouped_matmul, w), (grouped_swiglu, jnp.concatenate([w, w], axis=2))):
        with pytest.raises(NotImplementedError, match="the default device is cpu: take 'auto'"):
            op(x, weight, sizes, implementation="triton")
        assert op(x, weight, sizes).shape == (96, 24)
    with pytest.raises(NotImplementedError, match=r"a GPU of compute capability 7\.5"):
        require_triton(Target("cuda", 75))
