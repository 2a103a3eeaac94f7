"""Numbers that llama.cpp's files hold otherwise than config and model mean them: norms with the 1
that a centered norm adds, rates of decay without their logarithm."""

import numpy as np

from checkpoint.weight_map import Values

MANTISSAS = (7, 10, 23)
"""Bits of bfloat16, float16 and float32."""

STEP = 2.0**-23
"""Between float32 numbers, relatively: others' exponentials are out by one."""


def _with_one(scale: np.ndarray) -> np.ndarray:
    return scale.astype(np.float32) + np.float32(1)


def _without_one(scale: np.ndarray) -> np.ndarray:
    return scale - np.float32(1)


def _rate(log_rate: np.ndarray) -> np.ndarray:
    return (-np.exp(log_rate.astype(np.float64))).astype(np.float32)


def _log_rate(rate: np.ndarray) -> np.ndarray:
    """Of the logarithms that make this rate or one next to it, that with the fewest bits: several
    do, and released models hold theirs in 16.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.log(-rate.astype(np.float64))
    found = exact.astype(np.float32)
    for bits in reversed(MANTISSAS):
        rounded = _rounded(exact, bits)
        is_near = np.abs(_rate(rounded) - rate) <= -STEP * rate
        found = np.where(is_near, rounded, found)
    return np.where(rate < 0, found, np.float32(np.nan))


def _rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """x to so many bits after the leading one, float32."""
    fraction, exponent = np.frexp(x)
    scale = 2.0 ** (bits + 1)
    return np.ldexp(np.rint(fraction * scale) / scale, exponent).astype(np.float32)


ONE_ABOVE = Values(write=_with_one, read=_without_one)
"""A norm centered on zero, whose factor is 1 + scale."""
NEGATIVE_RATE = Values(write=_rate, read=_log_rate)
"""-exp(x): what the logarithm of a decay's rate stands for."""
