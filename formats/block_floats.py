"""Weights stored as small floats with a scale per block: decoded to float32, and encoded.

FP8 (DeepSeek-V3, 2024, section 3.3): float8_e4m3 values [..., N, K], one scale for each block of
n x k of them (128 x 128), and the weight is value times scale.

MXFP4 (OCP Microscaling Formats 1.0, 2023; gpt-oss): 32 values along the last dim share a power of
two, kept as its exponent plus 127; a byte holds two values, the first in its low half.

Decoding works on the rows given, so that callers choose how much is in memory: beside the float32
result there are temporaries of one block of rows. A scale that is NaN (E8M0's 255) or a product
beyond float32 leaves NaN or infinity in the result, for the caller to refuse.
Letters: N rows, K columns, G groups of 32 columns.
"""

import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

FP8, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
GROUP = 32
"""Values that share a scale in MXFP4."""

_FP8_MAX = 448.0
_FP8_CLOSE = 2.0**-20  # of the largest: further away, weights were not decoded from FP8
_FP4_MAX = 6.0
_CHUNK = 2**20  # values at a time, where blocks leave the choice
_FP4_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_TABLE = np.concatenate([_FP4_HALF, -_FP4_HALF])  # by code: sign, two bits exponent, one bit
_FP4_PAIRS = np.stack([np.tile(_FP4_TABLE, 16), np.repeat(_FP4_TABLE, 16)], axis=-1)  # [byte, 2]


def fp8_scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight [..., N, K]: the blocks at the edges may be cut."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def decode_fp8(
    values_NK: np.ndarray, scales_nk: np.ndarray, block: tuple[int, int], first_row: int = 0
) -> np.ndarray:
    """Value times the scale of its block: float32 [..., N, K].

    Args:
      values_NK: float8 [..., N, K].
      scales_nk: float32, bfloat16 or E8M0 [..., n, k]; the blocks of the whole weight.
      block: rows and columns that share a scale.
      first_row: where the rows begin in the weight, if `values_NK` is a part of it.
    """
    weight_NK = np.empty(values_NK.shape, np.float32)
    scales_nk = scales_nk.astype(np.float32)
    columns = values_NK.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):
        for lead in np.ndindex(values_NK.shape[:-2]):
            for rows, i in _block_rows(values_NK.shape[-2], block[0], first_row):
                scale_K = _spread(scales_nk[lead][i], block[1], columns)
                part_RK = values_NK[lead][rows].astype(np.float32)
                np.multiply(part_RK, scale_K, out=weight_NK[lead][rows])
    return weight_NK


def encode_fp8(
    weight_NK: np.ndarray, block: tuple[int, int], *, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest float8 values and scales that put each block's largest at 448, the format's end.

    Args:
      weight_NK: float32 [..., N, K], finite.
      power_of_two: scales rounded up to powers of two and kept as E8M0 (`scale_fmt: ue8m0`).
    Returns:
      float8_e4m3 [..., N, K] and float32 or E8M0 [..., n, k]. A block of zeros has scale 1. What
      was decoded from blocks whose largest is 448 (for powers of two: above 224) is encoded as it
      was.
    """
    values_NK = np.empty(weight_NK.shape, FP8)
    scales_nk = np.empty(fp8_scales_shape(weight_NK.shape, block), np.float32)
    columns = weight_NK.shape[-1]
    for lead in np.ndindex(weight_NK.shape[:-2]):
        for rows, i in _block_rows(weight_NK.shape[-2], block[0], 0):
            part_RK = weight_NK[lead][rows].astype(np.float32)
            largest_K = np.abs(part_RK).max(axis=0)
            largest_k = np.maximum.reduceat(largest_K, np.arange(0, columns, block[1]))
            scale_k = _scale(largest_k, _FP8_MAX, power_of_two)
            if not power_of_two:
                scale_k = _nearest_scale(part_RK, scale_k, largest_k, block[1])
            scales_nk[lead][i] = scale_k
            values_NK[lead][rows] = _rounded(part_RK, _spread(scale_k, block[1], columns))
    return values_NK, scales_nk.astype(E8M0) if power_of_two else scales_nk


def _nearest_scale(
    part_RK: np.ndarray, scale_k: np.ndarray, largest_k: np.ndarray, width: int
) -> np.ndarray:
    """The scales, or their neighbours where those give the weights back.

    Largest = 448 scale was rounded, so that the division may end beside the scale it came from: by
    one place at most, as 448 is 7 times a power of two. Weights that never were float8 keep theirs.
    """
    columns, starts = part_RK.shape[1], np.arange(0, part_RK.shape[1], width)

    def error_k(scale_k: np.ndarray) -> np.ndarray:
        scale_K = _spread(scale_k, width, columns)
        error_RK = np.abs(_rounded(part_RK, scale_K).astype(np.float32) * scale_K - part_RK)
        return np.maximum.reduceat(error_RK.max(axis=0), starts)

    error = error_k(scale_k)
    was_fp8 = error <= _FP8_CLOSE * largest_k
    if not (was_fp8 & (error > 0)).any():
        return scale_k
    for end in (0, np.inf):
        near_k = np.nextafter(scale_k, np.float32(end))
        near_error = error_k(near_k)
        scale_k = np.where(was_fp8 & (near_error < error), near_k, scale_k)
        error = np.minimum(error, near_error)
    return scale_k


def _rounded(part_RK: np.ndarray, scale_K: np.ndarray) -> np.ndarray:
    return np.clip(part_RK / scale_K, -_FP8_MAX, _FP8_MAX).astype(FP8)


def _spread(scale_k: np.ndarray, width: int, columns: int) -> np.ndarray:
    """Each block's scale for its columns; a block may be given as wider than the weight, by any
    number.
    """
    return np.repeat(scale_k, min(width, columns))[:columns]


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of packed blocks: float32 [..., G * 32].

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G]: exponents plus 127.
    """
    blocks_G, scales_G = blocks.reshape(-1, GROUP // 2), scales.reshape(-1).view(E8M0)
    values_G = np.empty((len(blocks_G), GROUP // 2, 2), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _chunks(len(blocks_G), _CHUNK // GROUP):
            np.take(_FP4_PAIRS, blocks_G[part], axis=0, out=values_G[part], mode="clip")
            values_G[part] *= scales_G[part].astype(np.float32)[:, None, None]
    return values_G.reshape(*scales.shape[:-1], scales.shape[-1] * GROUP)


def decode_fp4(pairs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Pairs of E2M1 times the scales of their blocks: float32 [N, K].

    Args:
      pairs: uint8 [N, K / 2], the first of two in the low half.
      scales: float32 [N, blocks], of equal width.
    """
    values = _FP4_PAIRS[pairs].reshape(len(pairs), scales.shape[1], -1)
    with np.errstate(over="ignore", invalid="ignore"):
        return (values * scales[:, :, None]).reshape(len(pairs), -1)


def encode_mxfp4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest packed values, under the smallest power of two that keeps them below 6.

    Ties go to the even code. What was decoded is encoded without loss.

    Args:
      weight: float32 [..., G * 32], finite.
    Returns:
      blocks uint8 [..., G, 16] and scales uint8 [..., G].
    """
    *leading, columns = weight.shape
    assert columns % GROUP == 0, (weight.shape, GROUP)
    weight_G = weight.reshape(-1, GROUP)
    blocks_G = np.empty((len(weight_G), GROUP // 2), np.uint8)
    scales_G = np.empty(len(weight_G), E8M0)
    for part in _chunks(len(weight_G), _CHUNK // GROUP):
        part_G = weight_G[part].astype(np.float32)
        scale_G = _scale(np.abs(part_G).max(axis=1), _FP4_MAX, power_of_two=True)
        codes_G = (part_G / scale_G[:, None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        blocks_G[part] = codes_G[:, ::2] | codes_G[:, 1::2] << 4
        scales_G[part] = scale_G.astype(E8M0)
    return (
        blocks_G.reshape(*leading, columns // GROUP, GROUP // 2),
        scales_G.view(np.uint8).reshape(*leading, columns // GROUP),
    )


def _scale(largest: np.ndarray, limit: float, power_of_two: bool) -> np.ndarray:
    """float32 scales, so that largest / scale <= limit (but for rounding); 1 where largest is 0."""
    # A scale below the normal numbers would lose digits, or become 0.
    scale = np.maximum(largest / np.float32(limit), np.finfo(np.float32).tiny)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1): 0.5 is a power of two itself
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return np.where(largest > 0, scale, np.float32(1)).astype(np.float32)


def _block_rows(rows: int, block_rows: int, first_row: int) -> Iterator[tuple[slice, int]]:
    """Slices of `rows` rows that begin at `first_row` of the weight, and the block each is of."""
    last = first_row + rows
    starts = range(first_row // block_rows * block_rows, last, block_rows)
    edges = [max(start, first_row) for start in starts] + [last]
    for start, stop in itertools.pairwise(edges):
        yield slice(start - first_row, stop - first_row), start // block_rows


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
