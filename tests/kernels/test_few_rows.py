"""Products of a few float32 rows with one large weight, natively: against numpy in float64, with
XLA's gradients, and only where they are meant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import native
from kernels.matmul import few_rows, matmul
from parallel.mesh import make_mesh

needs_native = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)
EQUATIONS = {
    "TK,KN->TN": lambda k, n: (k, n),
    "TK,NK->TN": lambda k, n: (n, k),
    "BLD,DHC->BLHC": lambda k, n: (k, n // 2, 2),
    "BLHC,HCD->BLD": lambda k, n: (k // 3, 3, n),
}


def draw(equation: str, rows: int, k: int, n: int):
    random = np.random.RandomState(0)
    shape = EQUATIONS[equation](k, n)
    inputs = (k // 3, 3) if equation.startswith("BLHC") else (k,)
    leading = (1, rows) if equation.startswith("B") else (rows,)
    x = random.standard_normal((*leading, *inputs)).astype(np.float32)
    return x, (random.standard_normal(shape) * k**-0.5).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def product_and_gradients(multiply, x, w):
    y, pull = jax.vjp(multiply, x, w)
    return y, pull(jnp.cos(y))


@needs_native
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(("k", "n"), [(576, 1536), (513, 1030), (300, 118)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.thinned(6)
def test_it_is_the_product_with_its_gradients(rows, k, n, equation, isa):
    """Depths that 256 does not divide, columns past a strip of 1,024 and that fill no vector."""
    x, w = draw(equation, rows, k, n)
    assert few_rows.is_native(rows, x.dtype, jnp.asarray(w))
    y, gradients = product_and_gradients(functools.partial(_ours, equation), x, w)
    exact = np.einsum(equation, x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(y, exact, atol=2e-6 * k**0.5)
    expected = product_and_gradients(functools.partial(jnp.einsum, equation), x, w)[1]
    for found, of in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, of, atol=1e-4)


def _ours(equation, x, w):
    return matmul(x, w, equation)


@needs_native
def test_only_a_few_rows_of_floats_that_meet_a_large_weight_take_it():
    w = jnp.ones((256, 256))
    assert few_rows.is_native(4, w.dtype, w)
    assert not few_rows.is_native(5, w.dtype, w)
    assert not few_rows.is_native(0, w.dtype, w)
    assert not few_rows.is_native(1, w.dtype, w[:100, :100])
    assert not few_rows.is_native(1, jnp.dtype("bfloat16"), w.astype("bfloat16"))
    with jax.set_mesh(make_mesh(1, 1, 2)):
        assert not few_rows.is_native(1, w.dtype, w)


@needs_native
def test_the_platform_is_chosen_when_the_program_is_lowered():
    traced = jax.jit(matmul).trace(jnp.ones((1, 256)), jnp.ones((256, 256)))
    assert "moesaic_thin_matmul" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_without_the_library_xla_multiplies(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    x, w = draw("TK,KN->TN", 1, 300, 118)
    program = jax.jit(functools.partial(matmul)).lower(x, w)
    assert "moesaic" not in program.as_text()


@needs_native
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("equation", ["TK,KN->TN", "TK,NK->TN"])
def test_what_is_not_finite_is_not_lost(value, equation):
    x, w = draw(equation, 2, 300, 118)
    x[1, 7] = value
    y = np.asarray(jax.jit(functools.partial(matmul, equation=equation))(x, np.abs(w)))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[0]).all()
