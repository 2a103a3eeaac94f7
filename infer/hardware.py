"""The device that serves: its data sheet, and what was measured on it.

A data sheet (configs/accelerators.py) has peak rates; on a CPU the rates of each format of weights
are measured once, in seconds, and kept in a file of the user's cache.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.accelerators import CPU, DATA_SHEETS, DataSheet, data_sheet_of
from configs.checks import UserError
from formats.small_files import read_record
from infer.weights import FORMATS
from kernels import native
from kernels.backend import Target, current_target
from kernels.matmul import matmul
from kernels.quantize import MatrixDims
from kernels.quantize.formats import WeightFormat, to_format

SIDE, PROMPT_ROWS = 2048, 128
"""Inputs and outputs of the matrix that is measured, and rows where a prompt is read."""
COPIED = 64 * 2**20
"""Bytes of the array that is copied."""


@dataclass(frozen=True)
class Rates:
    """What products with weights of one format reach."""

    weight_bytes: float
    """Bytes of weights that one row meets in a second."""
    flops: float
    """FLOP/s of PROMPT_ROWS rows."""


@dataclass(frozen=True)
class Measured:
    """What was measured on a device."""

    copy_bytes: float
    """Bytes in a second that copying an array reads and writes."""
    rates: dict[str, Rates]
    """By the format of weights."""


@dataclass(frozen=True)
class Hardware:
    """A device to serve on."""

    sheet: DataSheet
    measured: Measured | None = None
    """None: the sheet's peak rates count, so that times are bounds."""
    num_cores: int | None = None
    """Of a CPU that was looked at."""
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> Target | None:
        """What kernels are chosen for; None: nothing is known of them."""
        if self.sheet.platform == "unknown":
            return None
        return Target(self.sheet.platform, self.sheet.capability)

    @property
    def bandwidth(self) -> float:
        """Bytes in a second that a program reads: measured, else the sheet's."""
        return self.measured.copy_bytes if self.measured else self.sheet.memory_bandwidth

    def read_seconds(self, bytes_by_format: Mapping[WeightFormat, float]) -> float:
        """For one row to meet weights of so many bytes in each format."""
        if self.measured is None:
            return sum(bytes_by_format.values()) / self.bandwidth
        rates = self.measured.rates
        return sum(size / rates[name].weight_bytes for name, size in bytes_by_format.items())

    def multiply_seconds(self, flops: float, weights: WeightFormat, compute: str) -> float:
        """For so many FLOPs of many rows at once.

        Args:
          compute: the dtype of the rows.
        """
        if self.measured is not None:
            return flops / self.measured.rates[weights].flops
        return flops / (self.sheet.flops_16 if compute == "bfloat16" else self.sheet.flops_32)


def from_sheet(name: str) -> Hardware:
    """
    Raises:
      UserError: no such data sheet.
    """
    if name not in DATA_SHEETS:
        raise UserError(
            f"device {name!r} has no data sheet: take one of {', '.join(DATA_SHEETS)}, or here for "
            "this machine's own"
        )
    return Hardware(DATA_SHEETS[name])


def this_machine(
    memory: float | None,
    cache: Path | None,
    on_measure: Callable[[int, int], None] = lambda done, total: None,
) -> Hardware:
    """The default device: a CPU as it was measured, a GPU by its data sheet.

    Args:
      memory: bytes that there are, of a CPU; None: the data sheet's.
      cache: the file that keeps measurements; None measures anew.
      on_measure: called with formats measured and all of them, if any have to be.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        sheet = data_sheet_of(device.device_kind)
        limit = (device.memory_stats() or {}).get("bytes_limit", sheet.memory)
        return Hardware(dataclasses.replace(sheet, memory=limit, description=device.device_kind))
    measured = _kept(cache) if cache else None
    notes: tuple[str, ...] = ()
    if measured is None:
        measured = measure(on_measure)
        if cache:
            notes = _keep(cache, measured)
    sheet = dataclasses.replace(CPU, memory=memory or CPU.memory, description=_processor())
    return Hardware(sheet, measured, num_cores=os.cpu_count(), notes=notes)


def measure(on_measure: Callable[[int, int], None] = lambda done, total: None) -> Measured:
    """Copies an array, and multiplies one row and PROMPT_ROWS rows by a matrix of each format."""
    copied = np.ones(COPIED // 4, np.float32)
    copy_bytes = 2 * COPIED / least_seconds(copied.copy)
    w_KN = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.float32)
    rates = {}
    for done, name in enumerate(FORMATS):
        on_measure(done, len(FORMATS))
        held = to_format(w_KN, name, current_target(), dims=MatrixDims(1, 1))
        size = sum(x.nbytes for x in jax.tree.leaves(held))
        one, many = (_product_seconds(held, rows) for rows in (1, PROMPT_ROWS))
        rates[name] = Rates(size / one, 2 * PROMPT_ROWS * SIDE * SIDE / many)
    on_measure(len(FORMATS), len(FORMATS))
    return Measured(copy_bytes, rates)


def _product_seconds(held: Any, rows: int) -> float:
    x_TK = jnp.ones((rows, SIDE), jnp.float32)
    product = jax.jit(matmul)
    return least_seconds(lambda: product(x_TK, held).block_until_ready())


def least_seconds(run: Callable[[], Any], times: int = 5) -> float:
    """The least that a call takes, after one that is not counted."""
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return max(min(taken), 1e-9)


# --- The file that keeps it ----------------------------------------------------------------------


def _key() -> str:
    """What measurements depend on: the processor, its cores, its instructions, the programs."""
    isa = native.isa() if native.is_available() else "no native kernels"
    return f"{_processor()}, {os.cpu_count()} cores, {isa}, jax {jax.__version__}"


def _processor() -> str:
    """As Linux names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _kept(cache: Path) -> Measured | None:
    """What the file has of this machine; None: nothing, or it is damaged and is written anew."""
    try:
        found = read_record(dict[str, Measured], cache, "it is written anew").get(_key())
    except (FileNotFoundError, UserError):
        return None
    if found is None or set(found.rates) != set(FORMATS):
        return None
    rates = [
        found.copy_bytes,
        *(x for r in found.rates.values() for x in (r.weight_bytes, r.flops)),
    ]
    return found if min(rates) > 0 else None


def _keep(cache: Path, measured: Measured) -> tuple[str, ...]:
    """Writes it; a folder that can't be written costs the next start seconds, and is told."""
    written = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps({_key(): dataclasses.asdict(measured)}, indent=1))
        written.replace(cache)
    except OSError as error:
        return (f"the measurement is not kept: {cache} can't be written ({error.strerror})",)
    return ()
