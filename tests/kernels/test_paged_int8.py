"""paged_attention over int8 pages: against what they stand for, and against the floats rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.backend import INTERPRET
from kernels.paged_attention import paged_attention, pallas_triton, quantize_positions
from kernels.paged_attention.cases import CASES
from tests.kernels.test_paged_attention import TOLERANCE, draw, reach_of

xla = functools.partial(paged_attention, implementation="xla")
interpreted = functools.partial(pallas_triton.paged_attention, target=INTERPRET)
quantized = jax.jit(quantize_positions, static_argnums=1)


def over_floats(case, *operands):
    """Attention over float pages, which test_paged_attention.py holds to dense attention."""
    return np.asarray(jax.jit(functools.partial(xla, **reach_of(case)))(*operands))


def rounded(pages, scale_dtype="float32"):
    """int8 pages and their scales; what was never written keeps a scale of NaN."""
    values, scales = quantized(np.nan_to_num(pages), scale_dtype)
    return values, jnp.where(np.isnan(pages[..., 0]), jnp.nan, scales).astype(scale_dtype)


def restored(values, scales):
    return np.asarray(values, np.float32) * np.asarray(scales, np.float32)[..., None]


def run(function, case, q, k, v, tables, lengths, scale_dtype="float32"):
    (k, k_scales), (v, v_scales) = rounded(k, scale_dtype), rounded(v, scale_dtype)
    scales = {"k_scales_PSG": k_scales, "v_scales_PSG": v_scales}
    function = jax.jit(functools.partial(function, **reach_of(case)))
    return function(q, k, v, tables, lengths, **scales)


@pytest.mark.parametrize("function", [xla, interpreted], ids=["xla", "triton"])
@pytest.mark.parametrize("name", ["ragged", "sinks"])
def test_int8_pages_equal_attention_over_what_they_stand_for(name, function):
    case = CASES[name]
    operands, _ = draw(case)
    q, k, v, *rest = operands
    expected = over_floats(case, q, restored(*rounded(k)), restored(*rounded(v)), *rest)
    np.testing.assert_allclose(run(function, case, *operands), expected, **TOLERANCE)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", [xla, interpreted], ids=["xla", "triton"])
def test_rounding_is_bounded_by_its_step(function, scale_dtype):
    """A score moves by at most d, its weight by a factor of exp(2 d), a value by half a step."""
    case = CASES["sinks"]
    operands, (k, v) = draw(case)
    (_, k_scales), (_, v_scales) = (quantized(x, scale_dtype) for x in (k, v))
    root = 2 * np.sqrt(case.head_dim)
    moved = np.abs(operands[0]).sum(-1).max() * np.asarray(k_scales, np.float32).max() / root
    bound = np.expm1(2 * moved) * np.abs(v).max() + np.asarray(v_scales, np.float32).max() / 2
    expected = over_floats(case, *operands)
    error = np.abs(np.asarray(run(function, case, *operands, scale_dtype)) - expected).max()
    assert 1e-4 < error < bound
    assert error < 0.02  # of values whose deviation is 1: the bound is far from what rounding does


def test_a_version_without_the_values_scales_is_rejected():
    case = CASES["ragged"]
    operands, _ = draw(case)
    (q, k, v, *rest) = operands
    (k_int8, k_scales), (v_int8, v_scales) = rounded(k), rounded(v)
    scales = {"k_scales_PSG": k_scales, "v_scales_PSG": jnp.ones_like(v_scales)}
    wrong = jax.jit(functools.partial(xla, **reach_of(case)))(q, k_int8, v_int8, *rest, **scales)
    assert not np.allclose(wrong, over_floats(case, *operands), atol=0.02)


def test_an_appended_position_rounds_by_itself():
    x = np.random.RandomState(0).randn(3, 2, 16).astype(np.float32)
    values, scales = quantized(x, "bfloat16")
    alone = [quantized(row, "bfloat16") for row in x]
    assert values.dtype == jnp.int8
    assert scales.shape == (3, 2)
    np.testing.assert_array_equal(values, jnp.stack([row for row, _ in alone]))
    half_step = np.asarray(scales, np.float32)[..., None] / 2
    assert (np.abs(x - restored(values, scales)) <= half_step).all()


def test_what_does_not_fit_is_said():
    (q, k, v, *rest), _ = draw(CASES["multi_query"])
    (k_int8, k_scales), (v_int8, _) = rounded(k), rounded(v)
    with pytest.raises(ValueError, match=r"int8 need scales of shape \(7, 16, 1\), got None"):
        paged_attention(q, k_int8, v_int8, *rest, k_scales_PSG=k_scales)
    with pytest.raises(ValueError, match=r"float32 need scales None, got \(7, 16, 1\)"):
        paged_attention(q, k, v, *rest, k_scales_PSG=k_scales)
    with pytest.raises(ValueError, match="int32, and must be float or int8"):
        paged_attention(q, k_int8.astype(jnp.int32), v, *rest)
