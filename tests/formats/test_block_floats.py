"""FP8 and MXFP4 blocks against plain Python numbers, hand-made codes and transformers' outputs."""

import math

import ml_dtypes
import numpy as np
import pytest

from formats.block_floats import decode_fp8, decode_mxfp4, encode_fp8, encode_mxfp4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(code: int) -> float:
    """By its definition (OCP 8-bit floating point, 2023): bias 7, no infinity."""
    sign, exponent, fraction = -1 if code >> 7 else 1, (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def weights(*shape):
    """Rows and columns of very different sizes, so that a scale of another block shows."""
    rng = np.random.default_rng(0)
    rows, columns = (np.exp(3 * rng.normal(size=n)) for n in shape[-2:])
    return (rng.normal(size=shape) * rows[:, None] * columns).astype(np.float32)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_fp8_is_value_times_the_scale_of_its_block(scale_dtype):
    rng = np.random.default_rng(1)
    codes_NK = rng.integers(0, 127, (7, 10), dtype=np.uint8)  # 127 and 255 are NaN
    codes_NK |= rng.integers(0, 2, (7, 10), dtype=np.uint8) << 7
    scales_nk = (2.0 ** rng.integers(-9, 9, (3, 3))).astype(scale_dtype)
    expected = [
        [e4m3(int(codes_NK[n, k])) * float(scales_nk[n // 3, k // 4]) for k in range(10)]
        for n in range(7)
    ]
    values_NK = codes_NK.view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(decode_fp8(values_NK, scales_nk, (3, 4)), np.float32(expected))
    swapped = decode_fp8(values_NK, scales_nk.T, (3, 4))
    assert not np.array_equal(swapped, np.float32(expected))


def test_fp8_rows_alone_are_the_rows_of_the_whole():
    values_NK, scales_nk = encode_fp8(weights(20, 10), (8, 4))
    whole_NK = decode_fp8(values_NK, scales_nk, (8, 4))
    for start, stop in [(0, 20), (0, 3), (3, 9), (8, 16), (15, 20), (5, 5)]:
        first, last = start // 8, -(-stop // 8)
        part = decode_fp8(values_NK[start:stop], scales_nk[first:last], (8, 4), start - 8 * first)
        np.testing.assert_array_equal(part, whole_NK[start:stop])


def test_fp8_of_experts_is_each_expert_alone():
    values_EFD, scales_Efd = encode_fp8(weights(3, 20, 10), (8, 4))
    assert scales_Efd.shape == (3, 3, 3)
    together = decode_fp8(values_EFD, scales_Efd, (8, 4))
    alone = [decode_fp8(v, s, (8, 4)) for v, s in zip(values_EFD, scales_Efd, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_a_block_wider_than_the_weight_is_the_whole_weight():
    values_NK, scales_nk = encode_fp8(weights(4, 6), (10**15, 10**15))
    assert scales_nk.shape == (1, 1)
    expected = values_NK.astype(np.float32) * scales_nk
    np.testing.assert_array_equal(decode_fp8(values_NK, scales_nk, (10**15, 10**15)), expected)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_encodes_to_the_nearest_and_scales_by_the_largest(power_of_two):
    weight_NK = weights(20, 10)
    weight_NK[:8, :4] = 0
    values_NK, scales_nk = encode_fp8(weight_NK, (8, 4), power_of_two=power_of_two)
    assert scales_nk.dtype == (ml_dtypes.float8_e8m0fnu if power_of_two else np.float32)
    finite = sorted(e4m3(code) for code in range(256) if not math.isnan(e4m3(code)))
    for n, k in np.ndindex(20, 10):
        block = np.abs(weight_NK[n // 8 * 8 :][:8, k // 4 * 4 :][:, :4]).max()
        scale = float(block) / 448 if block else 1.0
        if power_of_two:
            scale = 2.0 ** math.ceil(math.log2(scale))
        # 1e-6: scale and quotient are rounded to float32.
        assert float(scales_nk[n // 8, k // 4]) == pytest.approx(scale, rel=1e-6)
        wanted = float(weight_NK[n, k]) / scale
        distance = min(abs(wanted - value) for value in finite)
        assert abs(float(values_NK[n, k]) - wanted) <= distance * (1 + 1e-5) + 448 * 1e-6


def test_fp8_with_powers_of_two_encodes_what_it_decoded_without_loss():
    decoded_NK = decode_fp8(*encode_fp8(weights(20, 10), (8, 4), power_of_two=True), (8, 4))
    again_NK = decode_fp8(*encode_fp8(decoded_NK, (8, 4), power_of_two=True), (8, 4))
    np.testing.assert_array_equal(again_NK, decoded_NK)


def test_fp8_encodes_the_smallest_and_largest_floats():
    for size in (1e-45, 1e-38, 3.4e38):
        values, scales = encode_fp8(np.full((2, 2), size, np.float32), (2, 2))
        decoded = decode_fp8(values, scales, (2, 2))
        # Half a step of float8 at its end is 1/28 of the value; subnormal scales are not used.
        np.testing.assert_allclose(decoded, size, rtol=1 / 28, atol=1.2e-38 * 2**-9)


TRANSFORMERS = """
0 0 .75 .25 -.25 .5 -1.5 1 .5 -.125 -.125 -.375 -1 -.75 .375 0
-0 .25 -.75 .5 .25 1.5 1.5 -.125 -.5 -.375 .125 -1 1 0 -.375 .25
0 24 24 48 -8 -4 -48 -12 16 -32 -4 0 -32 8 12 24
-0 48 -24 -4 8 -16 48 -32 -16 0 4 12 32 24 -12 48
"""
"""convert_moe_packed_tensors of transformers 5.23, in float32, transposed back."""


def test_mxfp4_decodes_as_transformers_does():
    blocks = (np.arange(32) * 37 % 256).astype(np.uint8).reshape(2, 1, 16)
    scales = np.array([[125], [130]], np.uint8)
    expected = np.array(TRANSFORMERS.split(), np.float32).reshape(2, 32)
    np.testing.assert_array_equal(decode_mxfp4(blocks, scales), expected)
    high_half_first = decode_mxfp4(blocks << 4 | blocks >> 4, scales)
    assert not np.array_equal(high_half_first, expected)


def test_mxfp4_is_each_half_byte_times_its_power_of_two():
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), dtype=np.uint8)
    scales = rng.integers(0, 250, (2, 3, 2), dtype=np.uint8)
    decoded = decode_mxfp4(blocks, scales)
    assert decoded.shape == (2, 3, 64)
    for i, j, k in np.ndindex(2, 3, 64):
        byte = int(blocks[i, j, k // 32, k % 32 // 2])
        code = byte >> 4 if k % 2 else byte & 15
        exponent = int(scales[i, j, k // 32]) - 127
        assert float(decoded[i, j, k]) == float(np.float32(math.ldexp(e2m1(code), exponent)))


def test_scales_that_are_nan_show_in_the_result():
    ones = np.full((1, 2, 16), 0x22, np.uint8)
    decoded = decode_mxfp4(ones, np.array([[127, 255]], np.uint8))
    assert np.array_equal(np.isnan(decoded), np.arange(64)[None] >= 32)
    assert np.isinf(decode_mxfp4(ones + 0x55, np.array([[254, 254]], np.uint8))).all()
    fp8 = np.ones((1, 2), ml_dtypes.float8_e4m3fn)
    nan_second = np.array([[127, 255]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(decode_fp8(fp8, nan_second, (1, 1)), [[1, np.nan]])


def test_mxfp4_encodes_to_the_nearest_without_clipping():
    weight = weights(6, 64)
    weight[0, :32] = 0
    blocks, scales = encode_mxfp4(weight)
    assert (blocks.shape, scales.shape) == ((6, 2, 16), (6, 2))
    decoded = decode_mxfp4(blocks, scales)
    for row, group in np.ndindex(6, 2):
        values = weight[row, 32 * group :][:32].astype(float)
        scale = 2.0 ** (int(scales[row, group]) - 127)
        largest = np.abs(values).max()
        assert largest == 0 or largest / 12 < scale <= largest / 3
        assert largest <= 6 * scale
        found = decoded[row, 32 * group :][:32]
        nearest = [min(abs(v - scale * e2m1(c)) for c in range(16)) for v in values]
        np.testing.assert_array_equal(np.abs(found - values), nearest)


def test_mxfp4_encodes_what_it_decoded_without_loss():
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (5, 4, 16), dtype=np.uint8)
    decoded = decode_mxfp4(blocks, rng.integers(100, 150, (5, 4), dtype=np.uint8))
    np.testing.assert_array_equal(decode_mxfp4(*encode_mxfp4(decoded)), decoded)
