"""QTensor: rounding within its bounds, every code there and back, orders that undo each other."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantize import QTensor, dequantize, quantize, repack
from kernels.quantize.packing import pack, unpack

SCALED = ("fp8_e4m3", "int8", "int4")


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def steps(q: QTensor) -> np.ndarray:
    """Each weight's scale, [..., K, N]."""
    return np.repeat(np.asarray(q.scales, np.float32), q.block_size, axis=-2)


def bound(w, q):
    """The error that quantize promises, and a rounding of the arithmetic itself."""
    step = steps(q)
    if q.format == "fp8_e4m3":
        return np.maximum(np.abs(w) / 16, step / 1024) * (1 + 1e-5)
    return step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", SCALED)
def test_error_is_within_the_bound(format, scale_dtype):
    w = draw(3, 256, 32) * np.exp(draw(3, 256, 32, seed=1) * 3)
    q = quantize(w, format, block_size=64, scale_dtype=scale_dtype)
    assert q.shape == w.shape
    assert (np.abs(dequantize(q) - w) <= bound(w, q)).all()


@settings(max_examples=30, deadline=None)
@given(*[st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)] * 2)
def test_any_pair_of_weights(a, b):
    w = np.array([[a], [b]], np.float32)
    for format in SCALED:
        q = quantize(w, format, block_size=2)
        back = np.asarray(dequantize(q))
        assert np.isfinite(back).all()
        # Steps below the least float32 are none: then all a block can hold is zero.
        tiny = np.finfo(np.float32).tiny * 512
        assert (np.abs(back - w) <= bound(w, q) + tiny).all()


def test_bf16_is_a_cast():
    w = draw(8, 4)
    q = quantize(w, "bf16")
    np.testing.assert_array_equal(dequantize(q), w.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert q.nbytes == 2 * w.size


def test_a_zero_block_stays_zero_and_has_no_nan():
    w = np.zeros((256, 8), np.float32)
    w[128:] = draw(128, 8)
    for format in SCALED:
        back = np.asarray(dequantize(quantize(w, format)))
        np.testing.assert_array_equal(back[:128], 0)
        assert np.isfinite(back).all()


def test_bits_per_weight_count_the_scales():
    w = draw(256, 64)
    assert quantize(w, "int8").nbytes * 8 / w.size == 8 + 32 / 128
    assert quantize(w, "int4").nbytes * 8 / w.size == 4 + 32 / 128
    assert quantize(w, "int4", block_size=32, scale_dtype="bfloat16").nbytes * 8 / w.size == 4.5


def test_all_codes_of_int8_and_int4_come_back():
    for format, largest in (("int8", 127), ("int4", 7)):
        codes = np.arange(-largest, largest + 1, dtype=np.float32)
        w = np.concatenate([codes, np.zeros(-len(codes) % 2)])[:, None]
        q = quantize(w, format, block_size=len(w))
        np.testing.assert_array_equal(dequantize(q), w)


def test_all_codes_of_fp8_come_back():
    """Every finite e4m3 value is kept, subnormal ones too; ml_dtypes says what they are."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    w = codes[np.isfinite(codes)][:, None]
    np.testing.assert_array_equal(dequantize(quantize(w, "fp8_e4m3", block_size=len(w))), w)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", ["canonical", "panels", "split_128"])
def test_packing_keeps_every_code(bits, packing):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = np.random.RandomState(0).choice(codes, (2, 32, 256)).astype(np.int8)
    stored = pack(jnp.array(values), bits, packing)
    assert stored.size * 8 == values.size * bits
    np.testing.assert_array_equal(unpack(stored, bits, packing), values)


def test_panels_put_sixteen_outputs_side_by_side():
    values = jnp.arange(32 * 8, dtype=jnp.int32).astype(jnp.int8).reshape(32, 8)
    panels = np.asarray(pack(values, 8, "panels")).reshape(2, 2, 16, 4)
    np.testing.assert_array_equal(panels[1, 1, 5], values[16 + 5, 4:8])


def test_canonical_int4_has_the_even_input_in_the_low_nibble():
    stored = pack(jnp.array([[3, -2]], jnp.int8), 4, "canonical")
    assert int(stored[0, 0]) == 3 | (14 << 4)


def test_another_order_is_the_same_weight():
    q = quantize(draw(2, 256, 32), "int4")
    for packing in ("panels", "split_128", "canonical"):
        np.testing.assert_array_equal(dequantize(repack(q, packing)), dequantize(q))


def test_a_wrong_order_is_another_weight():
    q = quantize(draw(256, 32), "int4")
    values = repack(q, "panels").values
    misread = QTensor(values, q.scales, q.format, q.block_size, "split_128")
    assert not np.allclose(dequantize(misread), dequantize(q))


def test_a_stack_of_layers_is_sliced_by_scan():
    w = draw(3, 128, 16)
    q = quantize(w, "int4")
    each = jax.lax.scan(lambda _, layer: (None, dequantize(layer)), None, q)[1]
    np.testing.assert_array_equal(each, dequantize(q))


def test_quantize_runs_under_jit():
    w = draw(128, 16)
    q = jax.jit(lambda w: quantize(w, "fp8_e4m3"))(w)
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize(w, "fp8_e4m3")))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: quantize(draw(100, 4), "int8"), "block_size=128 must divide the 100 inputs"),
        (lambda: quantize(draw(128, 4), "int3"), "must be one of"),
        (lambda: quantize(draw(128), "int8"), r"must be \[..., inputs, outputs\]"),
        (lambda: quantize(draw(3, 4), "int4", block_size=3), "in pairs"),
        (lambda: quantize(draw(128, 4), "int8", scale_dtype="float16"), "float32 or bfloat16"),
        (lambda: quantize(draw(128, 4) * np.inf, "int8"), "512 of 512 weights are not finite"),
        (lambda: repack(quantize(draw(128, 4), "int8"), "panels"), "multiples of 4 x 16"),
    ],
)
def test_what_can_not_be_done_is_said(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
