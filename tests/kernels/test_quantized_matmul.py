"""quantized_matmul: against numpy in float64 on the weights that the QTensor stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.quantize import dequantize, quantize, repack
from kernels.quantized_matmul import quantized_matmul, quantized_swiglu
from kernels.quantized_matmul.cases import CASES, Case

needs_native = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)


# One program for each shape: operation by operation, compiling would take most of the tests' time.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantized(w, format, block_size, scale_dtype, packing):
    weight = quantize(w, format, block_size=block_size, scale_dtype=scale_dtype)
    return repack(weight, packing)


to_floats = jax.jit(dequantize)


def draw(case: Case, format: str, packing="panels"):
    random = np.random.RandomState(0)
    x = random.standard_normal((case.rows, case.d_in)).astype(np.float32)
    shape = (len(case.group_sizes), case.d_in, case.d_out)
    gate, up = (
        quantized(
            random.standard_normal(shape).astype(np.float32),
            format,
            case.block_size,
            case.scale_dtype,
            packing,
        )
        for _ in range(2)
    )
    return x, gate, up, jnp.array(case.group_sizes, jnp.int32)


def expected(x, weight, group_sizes):
    """Group by group in float64; zero past the last."""
    return by_groups(x, np.asarray(to_floats(weight), np.float64), group_sizes)


def by_groups(x, w, group_sizes):
    y, begin = np.zeros((x.shape[0], w.shape[-1])), 0
    for e, size in enumerate(np.asarray(group_sizes)):
        y[begin : begin + size] = x[begin : begin + size].astype(np.float64) @ w[e]
        begin += size
    return y


def rounding_bound(x, weight, group_sizes):
    """Half a step of each input's block, times the magnitudes of its weights."""
    z = weight.block_size
    largest = np.abs(x.reshape(x.shape[0], -1, z)).max(axis=-1, keepdims=True)
    half_step = np.broadcast_to(largest / 254, (*largest.shape[:2], z)).reshape(x.shape)
    magnitude = np.abs(np.asarray(to_floats(weight), np.float64))
    return by_groups(half_step, magnitude, group_sizes) + 1e-3


@needs_native
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_native_float_product_is_the_definition_s(name, format, isa):
    x, weight, _, sizes = draw(CASES[name], format)
    y = quantized_matmul(x, weight, sizes, implementation="cpu")
    # Sums of up to 1,024 products of size 1 in float32.
    np.testing.assert_allclose(y, expected(x, weight, sizes), rtol=1e-5, atol=1e-3)


@needs_native
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_native_rounded_product_is_within_half_a_step(name, format, isa):
    x, weight, _, sizes = draw(CASES[name], format)
    rounded = functools.partial(quantized_matmul, activations="int8")
    multiply = jax.jit(rounded, static_argnames="implementation")
    y = multiply(x, weight, sizes, implementation="cpu")
    error = np.abs(y - expected(x, weight, sizes))
    assert (error <= rounding_bound(x, weight, sizes)).all()
    # And it is what rounding in plain XLA gives, but for the order of sums and ties.
    plain = multiply(x, weight, sizes, implementation="reference")
    np.testing.assert_allclose(y, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max() + 1e-6)


@needs_native
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_swiglu_is_two_products_and_a_gate(name, activations, isa):
    x, gate, up, sizes = draw(CASES[name], "int4")
    y = quantized_swiglu(x, gate, up, sizes, activations=activations, implementation="cpu")
    one, other = (
        quantized_matmul(x, w, sizes, activations=activations, implementation="cpu")
        for w in (gate, up)
    )
    np.testing.assert_allclose(y, jax.nn.silu(one) * other, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_extreme_codes_do_not_overflow(activations, isa):
    """The largest products a block can have, of one sign: where sums of few bits would clip."""
    x = np.full((1, 65536), -1.0, np.float32)
    for format in ("int8", "int4"):
        for sign in (1, -1):
            w = np.full((65536, 16), sign, np.float32)
            weight = repack(quantize(w, format, block_size=65536), "panels")
            y = quantized_matmul(x, weight, activations=activations, implementation="cpu")
            np.testing.assert_allclose(y, np.full((1, 16), -65536.0 * sign), rtol=1e-6)


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_floats_in_digits_are_held_to_a_part_of_their_block_s_largest(rows, isa):
    """Of values between 1e-6 and 1e6 in one block, next to an oracle in float64."""
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, 64)) * 10 ** random.uniform(-6, 6, (rows, 64))
    x = x.astype(np.float32)
    w = random.standard_normal((64, 32)).astype(np.float32)
    weight = repack(quantize(w, "int8", block_size=32), "panels")
    y = quantized_matmul(x, weight, implementation="cpu")
    exact_w = np.asarray(dequantize(weight), np.float64)
    largest = np.repeat(np.abs(x.reshape(rows, 2, 32)).max(-1), 32, axis=1)
    # And the float32 roundings of 64 products and sums.
    bound = largest @ np.abs(exact_w) * (2.0**-23 + 2.0**-22)
    assert (np.abs(y - x.astype(np.float64) @ exact_w) <= bound).all()


@needs_native
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 6])
def test_what_is_not_finite_is_not_lost(value, rows, activations, isa):
    x = np.ones((rows, 64), np.float32)
    x[1, 40] = value
    weight = repack(quantize(np.ones((64, 16), np.float32), "int8", block_size=32), "panels")
    y = quantized_matmul(x, weight, activations=activations, implementation="cpu")
    assert not np.isfinite(y[1]).any()
    np.testing.assert_allclose(np.delete(y, 1, axis=0), 64.0, rtol=1e-6)


@needs_native
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 6),
    st.sampled_from([8, 16, 24, 32]),
    st.integers(1, 5),
    st.sampled_from(["int8", "int4"]),
)
def test_any_shape(group_sizes, spare, blocks, block_size, panels, format):
    case = Case(
        rows=max(sum(group_sizes) + spare, 1),
        d_in=blocks * block_size,
        d_out=16 * panels,
        group_sizes=tuple(group_sizes),
        block_size=block_size,
    )
    x, weight, _, sizes = draw(case, format)
    y = quantized_matmul(x, weight, sizes, implementation="cpu")
    np.testing.assert_allclose(y, expected(x, weight, sizes), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
def test_every_format_multiplies(format, implementation):
    case = CASES["skewed"]
    x, weight, _, sizes = draw(case, format, "canonical")
    used = sum(case.group_sizes)
    y = quantized_matmul(x, weight, sizes, implementation=implementation)[:used]
    np.testing.assert_allclose(y, expected(x, weight, sizes)[:used], rtol=1e-5, atol=1e-3)


def test_without_groups_all_rows_meet_one_matrix():
    x, weight, _, _ = draw(CASES["one_group"], "int8")
    one = jax.tree.map(lambda a: a[0], weight)
    y = jax.jit(quantized_matmul)(x, one)
    np.testing.assert_allclose(y, x @ np.asarray(dequantize(one)), rtol=1e-5, atol=1e-3)


@needs_native
def test_the_platform_is_chosen_when_the_program_is_lowered():
    x, weight, _, sizes = draw(CASES["skewed"], "int8")
    traced = jax.jit(quantized_matmul).trace(x, weight, sizes)
    assert "moesaic" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, w, s: quantized_matmul(x[:, :-1], w, s), ValueError, "the same K"),
        (lambda x, w, s: quantized_matmul(x, w), ValueError, r"\[K, N\]"),
        (lambda x, w, s: quantized_matmul(x, w, s[:-1]), ValueError, "must be 4 integers"),
        (
            lambda x, w, s: quantized_matmul(x, repack(w, "canonical"), s, implementation="cpu"),
            NotImplementedError,
            'repack\\(weight, "panels"\\)',
        ),
        (
            lambda x, w, s: quantized_matmul(x.astype(jnp.bfloat16), w, s, implementation="cpu"),
            NotImplementedError,
            "they take float32",
        ),
        (
            lambda x, w, s: quantized_swiglu(x, w, quantize(dequantize(w), "int4"), s),
            ValueError,
            "must be alike",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, error, sentence):
    x, weight, _, sizes = draw(CASES["skewed"], "int8")
    with pytest.raises(error, match=sentence):
        call(x, weight, sizes)


def test_bf16_has_no_blocks_to_round_by():
    x, weight, _, sizes = draw(CASES["skewed"], "bf16", "canonical")
    with pytest.raises(ValueError, match="needs weights in blocks"):
        quantized_matmul(x, weight, sizes, activations="int8")
