"""What a machine can do at most: dense products and a copy, beside which a step's time is read."""

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.torch_products import SIDE
from kernels import native
from kernels.grouped_matmul import cpu

REPEATS = 5
COPY_BYTES = 256 << 20
"""More than caches hold."""
DTYPES = ("float32", "bfloat16")


def best_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least time of a call, after one that is not timed."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def products() -> dict[str, dict[str, float]]:
    """GFLOP/s of a product of matrices of SIDE by SIDE, by program and dtype."""
    found: dict[str, dict[str, float]] = {"XLA": {}}
    if native.is_available():
        found[f"native ({native.isa()})"] = {}
    for dtype in DTYPES:
        random = np.random.RandomState(0)
        x, w = (jnp.asarray(random.standard_normal((SIDE, SIDE)), dtype) for _ in range(2))
        sizes = jnp.array([SIDE], jnp.int32)
        ours = functools.partial(cpu.rows_times_matrix, transpose=False)
        runs = [
            functools.partial(jax.jit(jnp.matmul), x, w),
            functools.partial(jax.jit(ours), x, w[None], sizes),
        ]
        for name, run in zip(found, runs, strict=False):
            seconds = best_seconds(lambda run=run: jax.block_until_ready(run()))
            found[name][dtype] = 2.0 * SIDE**3 / seconds / 1e9
    return found


def torch_products(python: str) -> dict[str, float]:
    """The same of PyTorch in that Python; empty where it has none."""
    script = Path(__file__).with_name("torch_products.py")
    done = subprocess.run([python, str(script)], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def copy_bandwidth() -> float:
    """Bytes read and written in a second by one thread that copies more than caches hold, GB/s."""
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: np.copyto(target, source)) / 1e9


def read_bandwidth() -> float:
    """Bytes that all cores together read in a second of more than caches hold, GB/s."""
    count = len(os.sched_getaffinity(0))
    parts = np.split(np.ones(COPY_BYTES // count * count, np.uint8), count)
    with ThreadPoolExecutor(count) as pool:
        return COPY_BYTES / best_seconds(lambda: list(pool.map(np.max, parts))) / 1e9


def print_ceilings(torch_python: str) -> None:
    """A row per program; the best of a few calls each, all cores for products."""
    table = Table(f"{SIDE:,} cubed, GFLOP/s", *DTYPES)
    found = products()
    of_torch = torch_products(torch_python)
    if of_torch:
        found["PyTorch"] = of_torch
    for name, by_dtype in found.items():
        table.add_row(name, *(f"{by_dtype[dtype]:,.0f}" for dtype in DTYPES))
    Console().print(table)
    print(f"a copy by one thread: {copy_bandwidth():.1f} GB/s read and written")
