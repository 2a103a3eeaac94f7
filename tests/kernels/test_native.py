"""The native CPU kernels, on every instruction set of this machine, against numpy in float64."""

import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.grouped_matmul import automatic, cpu, grouped_matmul
from kernels.grouped_matmul.cases import CASES, Case
from kernels.native import library

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of up to 600 products of size 1

BLOCK_EDGES = {
    # More rows than a packed block (360), more depth than one (256), widths that no tile divides.
    "blocks": Case(rows=900, d_in=300, d_out=70, group_sizes=(361, 0, 13, 526)),
    "deep": Case(rows=30, d_in=513, d_out=33, group_sizes=(29, 1)),
    "wide": Case(rows=20, d_in=5, d_out=1030, group_sizes=(12, 8)),
    "few_rows": Case(rows=10, d_in=40, d_out=87, group_sizes=(1, 2, 3, 4)),
    "single": Case(rows=1, d_in=1, d_out=1, group_sizes=(1,)),
    "nothing": Case(rows=3, d_in=4, d_out=5, group_sizes=(0, 0)),
}


def draw(case: Case):
    random = np.random.RandomState(0)
    x = random.standard_normal((case.rows, case.d_in)).astype(np.float32)
    w = random.standard_normal((len(case.group_sizes), case.d_in, case.d_out)).astype(np.float32)
    dy = random.standard_normal((case.rows, case.d_out)).astype(np.float32)
    return x, w, dy, np.array(case.group_sizes, np.int32)


def by_group(case: Case):
    ends = np.cumsum(case.group_sizes)
    return [slice(end - size, end) for end, size in zip(ends, case.group_sizes, strict=True)]


def exact(a, b):
    return a.astype(np.float64) @ b.astype(np.float64)


def check_contractions(case: Case):
    x, w, dy, sizes = draw(case)
    y = jax.jit(functools.partial(cpu.rows_times_matrix, transpose=False))(x, w, sizes)
    dx = jax.jit(functools.partial(cpu.rows_times_matrix, transpose=True))(dy, w, sizes)
    dw = jax.jit(cpu.rows_times_rows)(x, dy, sizes)
    y, dx, dw = map(np.asarray, (y, dx, dw))  # each slice of jax's would be a program
    for e, rows in enumerate(by_group(case)):
        np.testing.assert_allclose(y[rows], exact(x[rows], w[e]), **TOLERANCE)
        np.testing.assert_allclose(dx[rows], exact(dy[rows], w[e].T), **TOLERANCE)
        np.testing.assert_allclose(dw[e], exact(x[rows].T, dy[rows]), **TOLERANCE)
    used = sum(case.group_sizes)
    np.testing.assert_array_equal(y[used:], 0)
    np.testing.assert_array_equal(dx[used:], 0)


@pytest.mark.parametrize("name", CASES | BLOCK_EDGES)
@pytest.mark.thinned(4)
def test_contractions_are_loops_over_groups(name, isa):
    check_contractions((CASES | BLOCK_EDGES)[name])


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=5),
    st.integers(0, 7),
    st.integers(1, 70),
    st.integers(1, 70),
)
@pytest.mark.slow
def test_any_shape(group_sizes, spare, d_in, d_out):
    rows = max(sum(group_sizes) + spare, 1)
    check_contractions(Case(rows=rows, d_in=d_in, d_out=d_out, group_sizes=tuple(group_sizes)))


def test_gradients_are_the_reference_s():
    case = CASES["skewed"]
    x, w, dy, sizes = draw(case)

    def pulled(implementation):
        y, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w
        )
        return y, *pull(dy)

    for ours, theirs in zip(pulled("cpu"), pulled("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(50, 60, 40), (-1, 20, 20)])
def test_group_sizes_that_do_not_fit_are_an_error_not_a_crash(sizes):
    x, w, _, _ = draw(Case(rows=96, d_in=8, d_out=8, group_sizes=(32, 32, 32)))
    with pytest.raises(Exception, match="sizes must be at least 0 and sum to at most 96"):
        jax.block_until_ready(cpu.grouped_matmul(x, w, jnp.array(sizes, jnp.int32)))


def test_float16_is_said_to_be_missing():
    x, w, _, sizes = draw(CASES["balanced"])
    with pytest.raises(NotImplementedError, match="multiply float32 and bfloat16"):
        grouped_matmul(x.astype(jnp.float16), w.astype(jnp.float16), sizes, implementation="cpu")


def test_many_callers_at_once_share_the_threads():
    """Each of eight devices runs its own product on the threads that all of them share."""
    x, w, _, sizes = draw(BLOCK_EDGES["blocks"])
    expected = cpu.grouped_matmul(x, w, sizes)
    everywhere = [[jax.device_put(a, d) for a in (x, w, sizes)] for d in jax.devices()]
    results = [jax.jit(cpu.grouped_matmul)(*arguments) for arguments in everywhere * 4]
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_helpers_that_wait_for_the_next_product_leave_none_out():
    """Hundreds of products of microseconds, one after the other, from eight callers at once."""
    random = np.random.RandomState(0)
    w = np.linalg.qr(random.standard_normal((256, 256)))[0][None].astype(np.float32)
    x, sizes = random.standard_normal((40, 256)).astype(np.float32), np.array([40], np.int32)

    @jax.jit
    def powers(x, w, sizes):
        product = functools.partial(cpu.rows_times_matrix, transpose=False)
        return jax.lax.fori_loop(0, 300, lambda _, x: product(x, w, sizes), x)

    everywhere = [[jax.device_put(a, d) for a in (x, w, sizes)] for d in jax.devices()]
    results = [powers(*arguments) for arguments in everywhere]
    expected = np.asarray(x, np.float64) @ np.linalg.matrix_power(np.asarray(w[0], np.float64), 300)
    for result in results:
        # An orthogonal matrix keeps lengths: 300 roundings of 1e-7 add up to at most 1e-4.
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_the_platform_is_chosen_when_the_program_is_lowered():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw(CASES["balanced"])]
    x, w, _, sizes = shapes
    traced = jax.jit(automatic.grouped_matmul).trace(x, w, sizes)
    assert "moesaic_rows_times_matrix" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_library_of_other_sources_is_refused(tmp_path):
    shutil.copytree(library.SOURCES, tmp_path / "src")
    file = tmp_path / "src" / "gemm.cc"
    file.write_text(file.read_text() + "// changed")
    spec = library.importlib.util.find_spec(library.MODULE)
    with pytest.raises(ImportError, match="built from other sources"):
        library.load(library.Path(spec.origin), tmp_path / "src")


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="can't be loaded"):
        library.load(tmp_path / "broken.so")


def test_without_the_library_plain_xla_does_the_work_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(library, "MODULE", "moesaic_native_missing")
    monkeypatch.setattr(library, "_library", functools.cache(library._library.__wrapped__))
    x, w, _, sizes = draw(CASES["skewed"])
    with caplog.at_level(logging.WARNING):
        lowered = [jax.jit(automatic.grouped_matmul).lower(x, w, sizes) for _ in range(2)]
    assert all("moesaic" not in program.as_text() for program in lowered)
    assert [record.getMessage() for record in caplog.records] == [
        "the native CPU kernels are not built: run `make .venv`, or `pip install .`, with a C++ "
        "compiler (g++ or clang++) present. Plain XLA does their work, slower."
    ]
    with pytest.raises(NotImplementedError, match="not built"):
        cpu.grouped_matmul(x, w, sizes)
