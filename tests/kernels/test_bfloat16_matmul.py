"""matmul of rows in bfloat16 with an array: what "auto" takes, its results and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import native
from kernels.matmul import bfloat16, matmul

EQUATIONS = {
    "TK,KN->TN": ((70, 24), (24, 40)),
    "BLD,DHC->BLHC": ((2, 35, 24), (24, 4, 10)),
    "BLHC,HCD->BLD": ((2, 35, 4, 6), (4, 6, 40)),
}


@pytest.fixture
def tiles():
    """The instruction set on which they are measured to be faster."""
    before = native.isa() if native.is_available() else ""
    if not (before and native.use_isa("amx")):
        pytest.skip("this processor, this system or this build has no tiles")
    yield
    native.use_isa(before)


def draw(equation, weights="float32"):
    random = np.random.RandomState(0)
    of_x, of_w = EQUATIONS[equation]
    x = jnp.asarray(random.standard_normal(of_x), jnp.bfloat16)
    w = jnp.asarray(random.standard_normal(of_w), weights)
    return x, w


def pulled(equation, multiply, x, w):
    y, pull = jax.vjp(lambda x, w: multiply(x, w, equation), x, w)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return y, *pull(dy)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_is_the_einsum_of_rounded_operands_with_gradients(equation, weights, tiles):
    x, w = draw(equation, weights)
    ours = pulled(equation, matmul, x, w)
    exact = pulled(
        equation,
        lambda x, w, equation: jnp.einsum(equation, x, w, precision="highest"),
        x.astype(jnp.float32),
        w.astype(jnp.bfloat16).astype(jnp.float32),
    )
    assert [a.dtype for a in ours] == [jnp.bfloat16, jnp.bfloat16, jnp.dtype(weights)]
    for mine, theirs in zip(ours, exact, strict=True):
        # The result in bfloat16, and gradients of dy, which was rounded before.
        np.testing.assert_allclose(
            mine.astype(jnp.float32), theirs, rtol=2**-8, atol=2**-8 * np.abs(theirs).max()
        )


def test_the_gradient_of_a_float32_weight_is_not_rounded(tiles):
    x, w = draw("TK,KN->TN")
    dy = jnp.ones((70, 40), jnp.bfloat16)
    dw = jax.vjp(lambda w: matmul(x, w), w)[1](dy)[0]
    exact = np.asarray(x, np.float64).sum(axis=0)
    np.testing.assert_allclose(dw, np.broadcast_to(exact[:, None], w.shape), rtol=1e-5, atol=1e-5)


def test_the_platform_is_chosen_when_the_program_is_lowered(tiles):
    x, w = draw("TK,KN->TN")
    traced = jax.jit(matmul).trace(x, w)
    assert "moesaic_half" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def program(x, w):
    """Traced anew: what is taken depends on the instruction set."""
    return jax.jit(lambda x, w: matmul(x, w)).lower(x, w).as_text()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_where_xla_is_faster_it_multiplies(isa):
    if not native.is_available():
        pytest.skip("the native library is not built: no C++ compiler")
    before = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        assert "moesaic" not in program(*draw("TK,KN->TN"))
    finally:
        native.use_isa(before)


def test_few_rows_float32_and_rows_that_a_mesh_splits_stay_with_xla(tiles):
    x, w = draw("TK,KN->TN")
    few = program(x[: bfloat16.FEWEST_ROWS - 1], w)
    floats = program(x.astype(jnp.float32), w)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        split = program(x, w)
    assert "moesaic" in program(x, w)
    for text in (few, floats, split):
        assert "moesaic" not in text
