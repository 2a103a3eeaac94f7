"""grouped_matmul with weights of few bits, in Pallas' interpreter, against dequantized weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.quantize
from kernels.backend import A100, H100, INTERPRET, Target
from kernels.grouped_matmul import api, grouped_matmul, grouped_swiglu, implementations
from kernels.grouped_matmul import pallas_triton_quantized as kernel
from kernels.grouped_matmul.scaled_rows import scale_rows, unscale_rows
from kernels.quantize import quantize

dequantize = jax.jit(kernels.quantize.dequantize)
repack = jax.jit(kernels.quantize.repack, static_argnums=1)
reference, reference_swiglu = (
    jax.jit(functools.partial(op, implementation="reference"))
    for op in (grouped_matmul, grouped_swiglu)
)
SIZES = (9, 0, 30, 1)
"""Of 44 rows, four of which no group owns."""
D_IN, D_OUT = 256, 40
FORMATS = ("int8", "int4", "fp8_e4m3")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of 256 terms whose size is about 1


def draw(format, d_out=D_OUT, scale_dtype="float32"):
    random = np.random.RandomState(4)
    x, dy = random.randn(44, D_IN), random.randn(44, D_OUT)
    dy[sum(SIZES) :] = 0.0
    w = random.randn(len(SIZES), D_IN, d_out) * D_IN**-0.5
    w[:, 128:] *= 7.0  # scales that differ from block to block
    weight = quantize(w.astype(np.float32), format, scale_dtype=scale_dtype)
    if format == "int4":
        weight = repack(weight, "split_128")
    x, dy, sizes = jax.device_put(
        (x.astype(np.float32), dy.astype(np.float32), np.array(SIZES, np.int32))
    )
    return x, weight, sizes, dy


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradient(function, is_reference, x, weight, sizes, dy):
    weight = dequantize(weight) if is_reference else weight
    y, pull = jax.vjp(lambda x: function(x, weight, sizes), x)
    return y, *pull(dy)


@pytest.mark.parametrize(
    ("format", "gated"),
    [
        *((format, False) for format in FORMATS),
        ("int4", True),
        pytest.param("int8", True, marks=pytest.mark.slow),
        pytest.param("fp8_e4m3", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.thinned(2)
def test_kernels_equal_reference_with_the_gradient_of_x(format, gated):
    """40 outputs, which no block divides; bfloat16 scales where gated."""
    x, weight, sizes, dy = draw(format, *((2 * D_OUT, "bfloat16") if gated else ()))
    ours = functools.partial(kernel.grouped_matmul, gated=gated, target=INTERPRET)
    theirs = reference_swiglu if gated else reference
    pair = (with_gradient(f, f is theirs, x, weight, sizes, dy) for f in (ours, theirs))
    for a, b, what in zip(*pair, ("y", "dx"), strict=True):
        np.testing.assert_allclose(a, b, err_msg=what, **TOLERANCE)


def test_fp8_as_a_type_equals_its_bits():
    """Compute capability 8.9 converts e4m3 itself; the interpreter can, too."""
    x, weight, sizes, _ = draw("fp8_e4m3")
    of_bits, of_type = (
        jax.jit(functools.partial(kernel.grouped_matmul, target=target))(x, weight, sizes)
        for target in (INTERPRET, Target("interpret", 90))
    )
    np.testing.assert_array_equal(of_bits, of_type)
    assert kernel.readable(weight, A100)[0].dtype == jnp.uint8
    assert kernel.readable(weight, H100)[0].dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_rows_in_fp8_meet_weights_in_fp8(gated):
    x, weight, sizes, _ = draw("fp8_e4m3", *((2 * D_OUT,) if gated else ()))
    rows = scale_rows(x * jnp.where(jnp.arange(D_IN) < 128, 1.0, 3.0)[None])
    order = jnp.asarray(np.random.RandomState(0).permutation(44), jnp.int32)
    ours = functools.partial(kernel.grouped_matmul, gated=gated, target=Target("interpret", 90))
    found = jax.jit(ours)(rows, weight, sizes, rows_R=order)
    op = reference_swiglu if gated else reference
    exact = op(unscale_rows(rows)[order], dequantize(weight), sizes)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)
    wrong = rows._replace(scales=jnp.roll(rows.scales, 1, axis=1))  # of the other block
    assert not np.allclose(jax.jit(ours)(wrong, weight, sizes, rows_R=order), exact, atol=0.1)


def test_scaled_rows_are_off_by_half_a_step():
    x = draw("int8")[0].at[3, 128:].set(0.0)
    rows = scale_rows(x)
    step = jnp.maximum(jnp.abs(x) / 16, jnp.repeat(rows.scales, 128, axis=1) / 1024)
    assert (jnp.abs(unscale_rows(rows) - x) <= step * (1 + 1e-6)).all()
    assert rows.scales[3, 1] == 0.0
    with pytest.raises(ValueError, match="rows of 100 channels"):
        scale_rows(x[:, :100])


def test_rows_in_fp8_need_hopper_and_weights_in_fp8():
    x, weight, sizes, _ = draw("int8")
    rows = scale_rows(x)
    with pytest.raises(NotImplementedError, match=r"need a GPU of compute capability 8\.9"):
        kernel.grouped_matmul(rows, weight, sizes, target=A100)
    with pytest.raises(NotImplementedError, match="not with int8 in blocks of 128"):
        kernel.grouped_matmul(rows, weight, sizes, target=H100)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_offsets_are_added_beside_the_kernel(gated, monkeypatch):
    """With the gradient of x, by the implementation's name, as a model takes it."""
    monkeypatch.setattr(implementations.backend, "require_triton", lambda target: None)
    monkeypatch.setattr(api, "current_target", lambda: INTERPRET)
    x, _, sizes, dy = draw("int4")
    random = np.random.RandomState(5)
    w = random.randn(len(SIZES), D_IN, D_OUT * (2 if gated else 1)).astype(np.float32) + 0.5
    weight = repack(quantize(w * D_IN**-0.5, "int4", is_affine=True), "split_128")
    op, theirs = (grouped_swiglu, reference_swiglu) if gated else (grouped_matmul, reference)
    ours = functools.partial(op, implementation="triton")
    pair = (with_gradient(f, f is theirs, x, weight, sizes, dy) for f in (ours, theirs))
    used = sum(SIZES)
    for a, b, what in zip(*pair, ("y", "dx"), strict=True):
        np.testing.assert_allclose(a[:used], b[:used], err_msg=what, **TOLERANCE)


def test_rows_are_gathered():
    x, weight, sizes, _ = draw("int8")
    rows = jnp.asarray(np.random.RandomState(0).permutation(44), jnp.int32)
    ours = jax.jit(functools.partial(kernel.grouped_matmul, target=INTERPRET))
    gathered = ours(x, weight, sizes, rows_R=rows)
    np.testing.assert_array_equal(gathered, ours(x[rows], weight, sizes))


def test_bfloat16_rows_lose_one_rounding():
    x, weight, sizes, _ = draw("int4")
    x = x.astype(jnp.bfloat16)
    ours = jax.jit(functools.partial(kernel.grouped_matmul, target=INTERPRET))(x, weight, sizes)
    exact = reference(x.astype(jnp.float32), dequantize(weight), sizes)
    # Codes are exact in bfloat16 and scales multiply float32 sums: only the result is rounded.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("wrong", ["scales of the next block", "nibbles as in a checkpoint"])
def test_wrong_versions_are_rejected(wrong):
    x, weight, sizes, _ = draw("int4")
    expected = reference(x, dequantize(weight), sizes)
    if wrong == "scales of the next block":
        weight = dataclasses.replace(weight, scales=jnp.roll(weight.scales, 1, axis=1))
    else:
        canonical = repack(weight, "canonical")
        weight = dataclasses.replace(canonical, packing="split_128")
    found = jax.jit(functools.partial(kernel.grouped_matmul, target=INTERPRET))(x, weight, sizes)
    assert np.abs(np.asarray(found - expected)).max() > 0.1


# --- Codes ---------------------------------------------------------------------------------------


def test_every_finite_fp8_code_is_widened_exactly():
    """The 14 subnormal ones too, which a shift of exponents by itself gets wrong."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # not a number
    form = kernel.Form(1, 128, kernel.E4M3_UNIT)
    for dtype in (jnp.float32, jnp.bfloat16):
        (found,) = jax.jit(lambda c, dtype=dtype: kernel.widen(c, form, dtype))(codes)
        expected = codes.view(jnp.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(found, np.float32) * kernel.E4M3_UNIT, expected)


def test_every_pair_of_nibbles_is_widened_exactly():
    low, high = kernel.widen(
        jnp.arange(256, dtype=jnp.uint8), kernel.Form(2, 128, 1.0), jnp.float32
    )
    signed = np.concatenate([np.arange(8), np.arange(-8, 0)])
    np.testing.assert_array_equal(low, np.tile(signed, 16))
    np.testing.assert_array_equal(high, np.repeat(signed, 16))


# --- What the kernel lacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, r"int4 in split_128 order and these weights are canonical: .*repack"),
        ({"packing": "split_128", "block_size": 64}, "a multiple of 128 inputs for int4"),
        ({"format": "int8", "block_size": 8}, "a multiple of 16 inputs for int8"),
        (
            {"format": "int8", "packing": "panels"},
            "in canonical order .* are panels: .*repack",
        ),
    ],
)
def test_what_the_kernel_cannot_read_is_said(changes, sentence):
    weight = dataclasses.replace(quantize(jnp.ones((1, 256, 16)), "int4").as_matrices(), **changes)
    with pytest.raises(NotImplementedError, match=sentence):
        kernel.grouped_matmul(jnp.ones((4, 256)), weight, jnp.ones(1, jnp.int32), target=INTERPRET)
