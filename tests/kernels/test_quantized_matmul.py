"""Products with QTensors, against numpy in float64 on the weights that these stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.quantized_cases import CASES, Case
from kernels.matmul import matmul
from kernels.quantize import MatrixDims, QTensor, dequantize, quantize, repack

needs_native = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)


# One program for each shape: operation by operation, compiling would take most of the tests' time.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantized(w, format, block_size, scale_dtype, packing):
    of_blocks = {"block_size": block_size, "scale_dtype": scale_dtype}
    is_affine = format == "int4_affine"
    weight = quantize(w, "int4" if is_affine else format, is_affine=is_affine, **of_blocks)
    return repack(weight, packing)


to_floats = jax.jit(dequantize)
CHOICES = ("activations", "fixed_order", "implementation")
FORMATS = ("int8", "int4", "int4_affine", "fp8_e4m3")
multiply = jax.jit(grouped_matmul, static_argnames=CHOICES)
swiglu = jax.jit(grouped_swiglu, static_argnames=CHOICES)
multiply_int8 = functools.partial(multiply, activations="int8")
one_product = jax.jit(matmul, static_argnames=("equation", *CHOICES))


def draw(case: Case, format: str, packing="panels", halves=1):
    """x, a weight with so many times the case's outputs, and the group sizes."""
    random = np.random.RandomState(0)
    x = random.standard_normal((case.rows, case.d_in)).astype(np.float32)
    shape = (len(case.group_sizes), case.d_in, halves * case.d_out)
    w = random.standard_normal(shape).astype(np.float32)
    weight = quantized(w, format, case.block_size, case.scale_dtype, packing)
    return x, weight, np.array(case.group_sizes, np.int32)


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
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(4)
def test_native_float_product_is_the_definition_s(name, format, isa_or_tiles):
    x, weight, sizes = draw(CASES[name], format)
    y = multiply(x, weight, sizes, activations="float", implementation="cpu")
    # Sums of up to 1,024 products of size 1 in float32.
    np.testing.assert_allclose(y, expected(x, weight, sizes), rtol=1e-5, atol=1e-3)


@needs_native
@pytest.mark.parametrize("format", ["int8", "int4", "int4_affine"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(3)
def test_native_rounded_product_is_within_half_a_step(name, format, isa_or_tiles):
    x, weight, sizes = draw(CASES[name], format)
    y = multiply_int8(x, weight, sizes, implementation="cpu")
    error = np.abs(np.asarray(y) - expected(x, weight, sizes))
    assert (error <= rounding_bound(x, weight, sizes)).all()
    # And it is what rounding in plain XLA gives, but for the order of sums and ties.
    plain = multiply_int8(x, weight, sizes, implementation="reference")
    np.testing.assert_allclose(y, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max() + 1e-6)


@needs_native
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(12)
def test_what_is_fastest_errs_no_more_than_rounding(name, format, isa_or_tiles):
    """Within its bound, and where many rows are no more on average than in 8 bits."""
    x, weight, sizes = draw(CASES[name], format)
    how = {"activations": "auto", "implementation": "cpu"}
    y = np.asarray(multiply(x, weight, sizes, **how))
    rounded = np.asarray(multiply_int8(x, weight, sizes, implementation="reference"))
    exact = expected(x, weight, sizes)
    in_tiles = by_groups(np.abs(x) / 128, np.abs(to_floats(weight)), sizes)
    bound = np.maximum(rounding_bound(x, weight, sizes), in_tiles)
    assert (np.abs(y - exact) <= bound).all()
    assert ((y - exact) ** 2).mean() <= ((rounded - exact) ** 2).mean() * 1.1


@needs_native
@pytest.mark.parametrize("format", ["int4", "int4_affine"])
@pytest.mark.parametrize("activations", ["float", "int8", "auto"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(8)
def test_swiglu_gates_the_halves_of_one_product(name, activations, format, isa_or_tiles):
    """A version that took up's columns for the gate's, or every other one, would differ."""
    x, weight, sizes = draw(CASES[name], format, halves=2)
    how = {"activations": activations, "implementation": "cpu"}
    y = swiglu(x, weight, sizes, **how)
    gate, up = np.split(np.asarray(multiply(x, weight, sizes, **how)), 2, axis=1)
    np.testing.assert_allclose(y, jax.nn.silu(gate) * up, rtol=1e-4, atol=1e-4)


@needs_native
def test_swiglu_gathers_the_rows():
    case = CASES["skewed"]
    x, weight, sizes = draw(case, "int8", halves=2)
    rows = jnp.asarray(np.random.RandomState(1).randint(0, case.rows, case.rows), jnp.int32)
    gathered = grouped_swiglu(x, weight, sizes, rows_R=rows, implementation="cpu")
    np.testing.assert_array_equal(
        gathered, grouped_swiglu(x[rows], weight, sizes, implementation="cpu")
    )


@needs_native
@pytest.mark.parametrize("activations", ["float", "int8", "auto"])
def test_extreme_codes_do_not_overflow(activations, isa_or_tiles):
    """The largest products a block can have, of one sign: where sums of few bits would clip."""
    x = np.full((1, 65536), -1.0, np.float32)
    for format in ("int8", "int4"):
        for sign in (1, -1):
            w = np.full((65536, 16), sign, np.float32)
            weight = quantized(w, format, 65536, "float32", "panels")
            y = one_product(x, weight, activations=activations, implementation="cpu")
            np.testing.assert_allclose(y, np.full((1, 16), -65536.0 * sign), rtol=1e-6)


@needs_native
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_block_of_16_bits_does_not_overflow(code, rows, isa_or_tiles):
    """512 inputs, of which one more would be too many, and the next block that 24 bits get."""
    for block in (512, 520):
        values = jnp.full((16, block), code, jnp.int8)
        weight = repack(QTensor(values, jnp.ones((1, 16)), "int8", block), "panels")
        for sign in (1, -1):
            x = np.full((rows, block), sign, np.float32)
            y = one_product(x, weight, fixed_order=True, implementation="cpu")
            np.testing.assert_allclose(y, np.full((rows, 16), sign * code * block), rtol=1e-6)


@needs_native
@pytest.mark.parametrize(("activations", "part"), [("float", 2.0**-23), ("auto", 0.5 / 32767)])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 13])
def test_whole_numbers_are_held_to_a_part_of_their_block_s_largest(
    rows, activations, part, isa_or_tiles
):
    """Of values between 1e-6 and 1e6 in one block, next to an oracle in float64."""
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, 64)) * 10 ** random.uniform(-6, 6, (rows, 64))
    x = x.astype(np.float32)
    w = random.standard_normal((64, 32)).astype(np.float32)
    weight = quantized(w, "int8", 32, "float32", "panels")
    y = one_product(x, weight, activations=activations, implementation="cpu")
    exact_w = np.asarray(to_floats(weight), np.float64)
    largest = np.repeat(np.abs(x.reshape(rows, 2, 32)).max(-1), 32, axis=1)
    # And the float32 roundings of 64 products and sums.
    bound = largest @ np.abs(exact_w) * (part + 2.0**-22)
    assert (np.abs(y - x.astype(np.float64) @ exact_w) <= bound).all()


@needs_native
@pytest.mark.parametrize("activations", ["float", "int8", "auto"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 6])
def test_what_is_not_finite_is_not_lost(value, rows, activations, isa_or_tiles):
    x = np.ones((rows, 64), np.float32)
    x[1, 40] = value
    weight = quantized(np.ones((64, 16), np.float32), "int8", 32, "float32", "panels")
    y = one_product(x, weight, activations=activations, implementation="cpu")
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
    st.sampled_from(["int8", "int4", "int4_affine"]),
)
@pytest.mark.slow
def test_any_shape(group_sizes, spare, blocks, block_size, panels, format):
    case = Case(
        rows=max(sum(group_sizes) + spare, 1),
        d_in=blocks * block_size,
        d_out=16 * panels,
        group_sizes=tuple(group_sizes),
        block_size=block_size,
    )
    x, weight, sizes = draw(case, format)
    y = multiply(x, weight, sizes, activations="float", implementation="cpu")
    np.testing.assert_allclose(y, expected(x, weight, sizes), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_every_format_multiplies(format, implementation):
    case = CASES["skewed"]
    x, weight, sizes = draw(case, format, "canonical")
    used = sum(case.group_sizes)
    y = grouped_matmul(x, weight, sizes, implementation=implementation)[:used]
    np.testing.assert_allclose(y, expected(x, weight, sizes)[:used], rtol=1e-5, atol=1e-3)


@needs_native
@pytest.mark.parametrize("activations", ["float", "auto"])
@pytest.mark.parametrize("rows", [1, 2, 6, 30])
def test_offsets_are_added_to_large_ones_too(rows, activations, isa_or_tiles):
    """Weights far from zero beside their span, whose offsets are most of them; a product that took
    another block's, or another panel's, would be far off."""
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, 96)).astype(np.float32)
    middle = random.uniform(-30, 30, (3, 1, 48))
    w = (middle + random.standard_normal((3, 32, 48))).reshape(96, 48).astype(np.float32)
    weight = quantized(w, "int4_affine", 32, "float32", "panels")
    how = {"activations": activations, "implementation": "cpu"}
    y = one_product(x, weight, **how)
    exact_w = np.asarray(to_floats(weight), np.float64)
    np.testing.assert_allclose(exact_w, w, atol=0.3)
    span = 6.0  # of normal weights; x in 8 bits, or weights in bfloat16, meet no more than that
    bound = np.abs(x).sum(1, keepdims=True) * span * (2.0**-7 if activations == "auto" else 2e-6)
    assert (np.abs(y - x.astype(np.float64) @ exact_w) <= bound + 1e-4).all()


def test_gate_and_up_may_be_a_dimension():
    case = CASES["skewed"]
    x, weight, sizes = draw(case, "int8", halves=2)
    with_dim = dataclasses.replace(weight, outputs=(2, case.d_out))
    assert with_dim.shape == (4, case.d_in, 2, case.d_out)
    np.testing.assert_array_equal(
        grouped_swiglu(x, with_dim, sizes), grouped_swiglu(x, weight, sizes)
    )


@needs_native
@pytest.mark.parametrize("rows", [1, 40])
def test_every_code_of_fp8_is_widened_exactly(rows, isa_or_tiles):
    """Subnormal ones and what is not a number too, by both ways that floats are multiplied."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    values = jnp.asarray(codes.reshape(16, 16)).T.reshape(1, 16, 16)  # [.., N, K]
    weight = QTensor(values, jnp.ones((1, 2, 16)), "fp8_e4m3", 8)
    chosen = np.zeros((rows, 16), np.float32)
    chosen[np.arange(rows), np.arange(rows) % 16] = 1.0
    panels = repack(weight, "panels")
    sizes = jnp.array([rows])
    y = grouped_matmul(chosen, panels, sizes, activations="float", implementation="cpu")
    expected = np.asarray(dequantize(weight))[0, np.arange(rows) % 16]
    lost = np.isnan(np.asarray(dequantize(weight))[0]).any(axis=0)  # 0 * NaN is in every sum
    assert np.flatnonzero(lost).tolist() == [15]  # 127 and 255 are the last of their columns
    np.testing.assert_array_equal(np.asarray(y)[:, ~lost], expected[:, ~lost])
    assert np.isnan(np.asarray(y)[:, lost]).all()


# --- A fixed order -------------------------------------------------------------------------------

SHARES = {
    "alone": ([7], [1]),
    "few": ([0, 7, 3], [3]),
    "among others": ([5, 6, 7, 8, 9, 10, 11], [2, 0, 5]),
    "many": (list(range(40)), [40]),
    "in two groups": ([*range(20, 40), *range(7, 10)], [20, 3]),
}
"""Rows of 40, and the sizes of the groups that they fall into, all with one matrix."""


def in_every_share(multiply, x, weight):
    """Each row's results by share, which are to have the same bits."""
    for name, (rows, sizes) in SHARES.items():
        held = jax.tree.map(np.asarray, weight)
        stacked = jax.device_put(
            jax.tree.map(lambda a, n=len(sizes): np.concatenate([a] * n), held)
        )
        y = np.asarray(multiply(x[np.array(rows)], stacked, np.array(sizes, np.int32)))
        yield name, rows, y


def check_fixed_order(multiply, x, weight):
    whole = np.asarray(multiply(x, weight, np.array([len(x)], np.int32)))
    for name, rows, y in in_every_share(multiply, x, weight):
        np.testing.assert_array_equal(y, whole[np.array(rows)], err_msg=name)
    return whole


@needs_native
@pytest.mark.parametrize("activations", ["auto", "float", "int8"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("op", [multiply, swiglu], ids=["grouped_matmul", "grouped_swiglu"])
@pytest.mark.thinned(3)
def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it(op, format, activations, isa_or_tiles):
    if (format, activations) == ("fp8_e4m3", "int8"):
        pytest.skip("x is not rounded for weights in fp8")
    random = np.random.RandomState(0)
    x = random.standard_normal((40, 288)).astype(np.float32)
    w = random.standard_normal((1, 288, 64)).astype(np.float32)
    weight = quantized(w, format, 32, "bfloat16", "panels")
    how = {"activations": activations, "fixed_order": True, "implementation": "cpu"}
    y = check_fixed_order(functools.partial(op, **how), x, weight)
    bound = 1e-3 if activations == "float" else 1.0  # it is still the product: of size 17
    reference = op(x, weight, np.array([40], np.int32), implementation="reference")
    np.testing.assert_allclose(y, reference, rtol=0.03, atol=bound * 17)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("d_in", "d_out"), [(600, 70), (600, 64), (30, 64)])
def test_a_row_s_bits_in_products_with_arrays(dtype, d_in, d_out, isa_or_tiles):
    """600 inputs: more than a block's (256); 30 are no multiple of what is read at a time. The last
    columns fill no vector."""
    random = np.random.RandomState(0)
    x = random.standard_normal((40, d_in)).astype(np.float32)
    w = random.standard_normal((1, d_in, d_out)).astype(jnp.dtype(dtype))
    how = {"fixed_order": dtype == "bfloat16", "implementation": "cpu"}  # float32's always is
    y = check_fixed_order(jax.jit(functools.partial(grouped_matmul, **how)), x, w)
    exact = x.astype(np.float64) @ np.asarray(w[0], np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-3)


@needs_native
def test_without_it_bits_do_depend_on_them():
    """Else the tests above would prove nothing."""
    random = np.random.RandomState(0)
    x = random.standard_normal((40, 288)).astype(np.float32)
    w = random.standard_normal((1, 288, 64)).astype(np.float32)
    weight = quantized(w, "int8", 32, "bfloat16", "panels")
    fastest = functools.partial(multiply, activations="float", implementation="cpu")
    whole = np.asarray(fastest(x, weight, np.array([40], np.int32)))
    shares = in_every_share(fastest, x, weight)
    assert not all((y == whole[np.array(rows)]).all() for _, rows, y in shares)


@needs_native
@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize("format", [*FORMATS, "bfloat16"])
def test_with_as_many_rows_bits_do_not_depend_on_their_groups(format, rows, isa_or_tiles):
    """Of what is fastest, which few and many rows meet in other ways: a request's rows go to
    experts beside others' rows, or alone. All matrices are the same one.
    """
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, 288)).astype(np.float32)
    w = random.standard_normal((1, 288, 64)).astype(np.float32)
    is_array = format == "bfloat16"
    weight = w.astype(jnp.bfloat16) if is_array else quantized(w, format, 32, "bfloat16", "panels")
    stacked = jax.tree.map(lambda a: np.concatenate([a, a]), weight)
    fastest = jax.jit(functools.partial(grouped_matmul, implementation="cpu"))  # on this processor
    even, *others = (
        np.asarray(fastest(x, stacked, np.array([n, rows - n], np.int32)))
        for n in (rows // 2, rows - 1, 3, 0)
    )
    for y in others:
        np.testing.assert_array_equal(y, even)
    exact = x.astype(np.float64) @ np.asarray(w[0] if is_array else to_floats(weight)[0])
    assert np.abs(even - exact).max() < 0.05 * np.abs(exact).max()


def test_plain_xla_promises_no_order():
    x, w = jnp.ones((4, 8)), jnp.ones((1, 8, 8))
    with pytest.raises(NotImplementedError, match="XLA promises no order of sums"):
        grouped_matmul(x, w, jnp.array([4]), fixed_order=True, implementation="xla")


# --- Arrays in bfloat16 --------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("equation", ["TK,KN->TN", "TK,NK->TN"])
@pytest.mark.parametrize("shape", [(37, 50), (600, 96), (1, 16), (31, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.thinned(4)
def test_weights_in_bfloat16_are_read_as_stored(rows, shape, equation, isa_or_tiles):
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, shape[0])).astype(np.float32)
    w = random.standard_normal(shape if equation == "TK,KN->TN" else shape[::-1])
    w = jax.device_put(w.astype(ml_dtypes.bfloat16))
    exact_w = np.asarray(w, np.float64)
    exact = np.einsum(equation, x.astype(np.float64), exact_w)
    y = one_product(x, w, equation=equation, activations="float")
    magnitude = np.einsum(equation, np.abs(x), np.abs(exact_w))
    assert y.dtype == jnp.float32
    assert (np.abs(y - exact) <= magnitude * 2.0**-16 + 1e-6).all()
    rounded = one_product(x, w, equation=equation, activations="auto")
    assert (np.abs(rounded - exact) <= magnitude * 2.0**-8 + 1e-5).all()


@needs_native
def test_experts_in_bfloat16_and_no_floats_of_them():
    case = CASES["skewed"]
    random = np.random.RandomState(0)
    x = random.standard_normal((case.rows, case.d_in)).astype(np.float32)
    w = random.standard_normal((len(case.group_sizes), case.d_in, 2, case.d_out))
    w, sizes = jnp.asarray(w, jnp.bfloat16), jnp.array(case.group_sizes, jnp.int32)
    ours = jax.jit(functools.partial(grouped_swiglu, activations="float"))
    exact = by_groups(x, np.asarray(w, np.float64).reshape(4, case.d_in, -1), sizes)
    gate, up = np.split(exact, 2, axis=1)
    np.testing.assert_allclose(
        ours(x, w, sizes), gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-3
    )
    program = ours.lower(x, w, sizes).compile().as_text()
    assert "f32[4,128,160]" not in program


# --- One matrix ----------------------------------------------------------------------------------

WEIGHTS = {
    "q": ((64, 4, 8), "BLK,KHC->BLHC", MatrixDims(1, 2)),
    "o": ((4, 16, 32), "BLHC,HCD->BLD", MatrixDims(2, 1)),
    "kv": ((64, 2, 2, 8), "BLK,KiGC->BLiGC", MatrixDims(1, 3)),
    "output layer": ((96, 64), "BLK,VK->BLV", MatrixDims(1, 1, outputs_first=True)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_any_dimensions_is_its_einsum(name):
    shape, letters, dims = WEIGHTS[name]
    random = np.random.RandomState(0)
    _, inputs, outputs = dims.split(shape)
    x = random.standard_normal((2, 3, *inputs)).astype(np.float32)
    w = jnp.asarray(random.standard_normal(shape), jnp.float32)
    weight = quantize(w, "int8", dims=dims, block_size=32)
    packing = "panels" if native.is_available() else "canonical"
    multiply = functools.partial(matmul, equation=letters, activations="float")
    y = jax.jit(multiply)(x, repack(weight, packing))
    assert y.shape == (2, 3, *outputs)
    exact = np.einsum(letters, x.astype(np.float64), np.asarray(dequantize(weight), np.float64))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["q", "o", "kv"])
def test_of_an_array_the_product_is_einsum_bit_for_bit(name):
    shape, letters, dims = WEIGHTS[name]
    x = jax.random.normal(jax.random.key(0), (2, 3, *shape[: dims.inputs]))
    w = jax.random.normal(jax.random.key(1), shape)
    ours = jax.jit(functools.partial(matmul, equation=letters))
    theirs = jax.jit(functools.partial(jnp.einsum, letters))
    np.testing.assert_array_equal(ours(x, w), theirs(x, w))
    np.testing.assert_array_equal(
        jax.grad(lambda w: ours(x, w).sum())(w), jax.grad(lambda w: theirs(x, w).sum())(w)
    )


# --- Who multiplies, and what can't be done ------------------------------------------------------


@needs_native
def test_the_platform_is_chosen_when_the_program_is_lowered():
    x, weight, sizes = draw(CASES["skewed"], "int8")
    traced = jax.jit(grouped_matmul).trace(x, weight, sizes)
    assert "moesaic" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_native
@pytest.mark.parametrize("op", [grouped_matmul, grouped_swiglu])
def test_an_order_that_the_kernels_here_can_t_read_is_an_error_not_floats(op):
    x, weight, sizes = draw(CASES["skewed"], "int8", "canonical")
    with pytest.raises(NotImplementedError, match=r"are canonical: .*repack\(weight, 'panels'\)"):
        op(x, weight, sizes)


def test_without_kernels_plain_xla_reads_any_order(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    for packing in ("canonical", "panels"):
        x, weight, sizes = draw(CASES["skewed"], "int8", packing)
        used = sum(CASES["skewed"].group_sizes)
        y = jax.jit(functools.partial(grouped_matmul))(x, weight, sizes)[:used]
        np.testing.assert_allclose(y, expected(x, weight, sizes)[:used], rtol=1e-5, atol=1e-3)


@needs_native
def test_bfloat16_rows_lose_one_rounding():
    x, weight, sizes = draw(CASES["skewed"], "int4")
    y = grouped_matmul(x.astype(jnp.bfloat16), weight, sizes, activations="float")
    assert y.dtype == jnp.bfloat16
    exact = expected(x.astype(jnp.bfloat16).astype(np.float32), weight, sizes)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x, w, s: grouped_matmul(x[:, :-1], w, s), ValueError, "the same D"),
        (lambda x, w, s: matmul(x, w), ValueError, r"it stacks \(4,\) matrices of inputs \(128,\)"),
        (lambda x, w, s: grouped_matmul(x, w, s[:-1]), ValueError, "one entry per matrix"),
        (
            lambda x, w, s: grouped_matmul(x, repack(w, "canonical"), s, implementation="cpu"),
            NotImplementedError,
            "repack\\(weight, 'panels'\\)",
        ),
        (
            lambda x, w, s: grouped_matmul(x, dequantize(w), s, activations="int8"),
            ValueError,
            "is for weights of few bits",
        ),
        (
            lambda x, w, s: matmul(x, jnp.ones((128, 8)), activations="int8"),
            ValueError,
            "is for weights of few bits",
        ),
        (
            lambda x, w, s: matmul(x, jax.tree.map(lambda a: a[0], w), "TK,NK->TN"),
            ValueError,
            r"is not of this QTensor: it stacks \(\)",
        ),
        (
            lambda x, w, s: matmul(x, jax.tree.map(lambda a: a[0], w), "TK,NK->NT"),
            ValueError,
            "is no product of rows with one weight",
        ),
    ],
)
def test_what_does_not_fit_is_said(call, error, sentence):
    x, weight, sizes = draw(CASES["skewed"], "int8")
    with pytest.raises(error, match=sentence):
        call(x, weight, sizes)
