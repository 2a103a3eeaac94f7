"""Ceilings of a card, measured: a large copy, and a large product of bfloat16 matrices."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

COPIED_BYTES = 2**32
PRODUCT_SIZE = 8192
CALLS, ROUNDS = 20, 5


def measure_ceilings() -> dict[str, float]:
    """bytes_per_second of a copy, read and written bytes together, and flops_per_second.

    Operands are random: a product of zeros draws less power, and runs faster.
    """
    wide = jax.random.normal(jax.random.key(0), (COPIED_BYTES // 4,), jnp.float32)
    copied = _seconds(lambda x: -x, wide)
    del wide
    a, b = (
        jax.random.normal(jax.random.key(i), (PRODUCT_SIZE, PRODUCT_SIZE), jnp.bfloat16)
        for i in range(2)
    )
    b *= PRODUCT_SIZE**-0.5  # so that products of products keep their size
    multiplied = _seconds(lambda x: x @ b, a)
    return {
        "bytes_per_second": 2 * COPIED_BYTES / copied,
        "flops_per_second": 2.0 * PRODUCT_SIZE**3 / multiplied,
    }


def _seconds(function: Callable[[Any], Any], x: jax.Array) -> float:
    """Of one call of a function whose result is the next call's argument."""
    looped = jax.jit(lambda x: lax.fori_loop(0, CALLS, lambda _, x: function(x), x))
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(looped(x))
        times.append((time.perf_counter() - began) / CALLS)
    return statistics.median(times[1:])
