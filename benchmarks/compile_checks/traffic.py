"""Bytes that kernels move to and from memory, by a model of the L2 cache; grouped_matmul's grids.

Programs run in the grid's order, as many at a time as the GPU has cores, and those of one wave
share what they read: a block of an operand comes from memory once per wave, or not at all if it is
among what L2 has used last, results included. The cache is one, of the size that the data sheet
has, and as good as its size: an A100's two halves may each hold what both need, and real programs
drift apart. So this judges an order of the grid, and gives no time.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.compile_checks import work
from benchmarks.compile_checks.devices import Device
from kernels.backend import Target
from kernels.grouped_matmul import pallas_mosaic, pallas_mosaic_quantized
from kernels.grouped_matmul.cases import CompiledCase
from kernels.grouped_matmul.tiles import (
    SWEEP_BYTES,
    Tiles,
    choose_gradient_tiles,
    choose_quantized_tiles,
    choose_tiles,
    columns_of_strip,
)


class Access(NamedTuple):
    """Bytes of the blocks that one program reads, by name, and of those that it writes."""

    reads: Mapping[Hashable, float]
    writes: Mapping[Hashable, float]


def moved(grid: Iterable[Access], device: Device) -> float:
    """Bytes read from and written to memory by programs in this order."""
    cache, written, programs = _Cache(device.accelerator.l2_bytes), 0.0, iter(grid)
    while wave := list(itertools.islice(programs, device.accelerator.num_cores)):
        reads, writes = {}, {}
        for program in wave:
            reads |= program.reads
            writes |= program.writes
        cache.use(reads, writes)
        written += sum(writes.values())
    return cache.missed + written


class _Cache:
    """Keeps what was used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held, self.missed = capacity, 0.0, 0.0
        self.blocks: OrderedDict[Hashable, float] = OrderedDict()

    def use(self, reads: Mapping[Hashable, float], writes: Mapping[Hashable, float]) -> None:
        self.missed += sum(size for key, size in reads.items() if key not in self.blocks)
        for key, size in (*reads.items(), *writes.items()):
            self.held += size - self.blocks.get(key, 0.0)
            self.blocks[key] = size
            self.blocks.move_to_end(key)
        while self.held > self.capacity:
            self.held -= self.blocks.popitem(last=False)[1]


# --- Grouped products ----------------------------------------------------------------------------


def tiles_of(case: CompiledCase, target: Target) -> Tiles:
    """The tiles that a call of this case takes."""
    mean, itemsize = case.rows // case.num_groups, work.itemsize(case)
    transposed = case.contraction == "gradient_x"
    d_in, d_out = (case.d_out, case.d_in) if transposed else (case.d_in, case.d_out)
    if case.contraction == "gradient_w":
        return choose_gradient_tiles(d_in, d_out, target=target, itemsize=itemsize)
    if case.compiler == "mosaic" and case.format == "bf16":
        return pallas_mosaic.choose_tiles(d_out, target=target)
    if case.compiler == "mosaic":
        return pallas_mosaic_quantized.choose_tiles(mean, gated=case.gated, target=target)
    if case.format in ("bf16", "float32"):
        shape = {"itemsize": itemsize, "gated": case.gated}
        return choose_tiles(mean, d_in, d_out, target=target, **shape)
    return choose_quantized_tiles(mean, d_out, target=target, gated=case.gated)


def ratio(case: CompiledCase, tiles: Tiles, device: Device) -> float:
    """Bytes moved over the least."""
    is_gradient_w = case.contraction == "gradient_w"
    grid = _rows_times_rows(case, tiles) if is_gradient_w else _rows_times_matrix(case, tiles)
    return moved(grid, device) / work.grouped(case).least_bytes


def _rows_times_matrix(case: CompiledCase, tiles: Tiles) -> Iterator[Access]:
    """Of the forward pass and of the gradient of x, whose x is that of y."""
    width, d_out = case.d_in, case.d_out
    if case.contraction == "gradient_x":
        width, d_out = d_out, width
    column_bytes = width * work.bytes_per_weight(case) * (2 if case.gated else 1)
    groups, rows = _tiles(work.group_sizes(case), tiles.rows)
    itemsize = 1 if case.fp8_rows else work.itemsize(case)
    longest = max(1, SWEEP_BYTES // (tiles.rows * width * itemsize))
    for tile, column in _order(groups, -(-d_out // tiles.columns), longest):
        columns = min(tiles.columns, d_out - column * tiles.columns)
        yield Access(
            {
                ("x", tile): rows[tile] * width * work.bytes_per_input(case),
                ("w", groups[tile], column): columns * column_bytes,
            },
            {("y", tile, column): rows[tile] * columns * work.itemsize(case)},
        )


def _order(groups: list[int], columns: int, longest: int) -> Iterator[tuple[int, int]]:
    """(tile, block of columns) of each program, in the order that `place` gives them."""
    for _, of_group in itertools.groupby(range(len(groups)), key=groups.__getitem__):
        tiles = list(of_group)
        for first in range(0, len(tiles), longest):
            sweep = tiles[first : first + longest]
            yield from ((tile, column) for column in range(columns) for tile in sweep)


def _tiles(group_sizes: np.ndarray, tile_rows: int) -> tuple[list[int], list[int]]:
    """The group and the rows of each tile."""
    groups, rows = [], []
    for group, size in enumerate(group_sizes):
        for first in range(0, int(size), tile_rows):
            groups.append(group)
            rows.append(min(tile_rows, int(size) - first))
    return groups, rows


def _rows_times_rows(case: CompiledCase, tiles: Tiles) -> Iterator[Access]:
    """Of the gradient of the matrices: a group's blocks, each over all its rows."""
    size = work.itemsize(case)
    strip = columns_of_strip(case.rows // case.num_groups, tiles, size)
    across, down = -(-case.d_out // tiles.columns), -(-case.d_in // tiles.rows)
    for group, rows in enumerate(work.group_sizes(case)):
        for i, j in _strips(down, across, strip):
            height = min(tiles.rows, case.d_in - i * tiles.rows)
            width = min(tiles.columns, case.d_out - j * tiles.columns)
            yield Access(
                {
                    ("x", group, i): rows * height * size,
                    ("dy", group, j): rows * width * size,
                },
                {("dw", group, i, j): height * width * size},
            )


def _strips(down: int, across: int, strip: int) -> Iterator[tuple[int, int]]:
    """Row and column of each block, in the kernel's order."""
    for first in range(0, across, strip):
        yield from itertools.product(range(down), range(first, min(first + strip, across)))
