"""Bytes that grouped_matmul moves to and from memory, by a model of the L2 cache.

Programs run in the grid's order, as many at a time as the GPU has cores, and those of one wave
share what they read: a tile of x or a block of the weights comes from memory once per wave, or not
at all if it is among what L2 has used last. This judges an order of the grid, and gives no time.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from kernels.backend import Target
from kernels.compile_checks.devices import Device
from kernels.grouped_matmul.cases import CompiledCase
from kernels.grouped_matmul.tiles import (
    SWEEP_BYTES,
    Tiles,
    choose_gradient_tiles,
    choose_quantized_tiles,
    choose_tiles,
)
from kernels.quantize import FORMATS


def tiles_of(case: CompiledCase, target: Target) -> Tiles:
    """The tiles that a call of this case takes."""
    mean, itemsize = case.rows // case.num_groups, 4 if case.format == "float32" else 2
    transposed = case.contraction == "gradient_x"
    d_in, d_out = (case.d_out, case.d_in) if transposed else (case.d_in, case.d_out)
    if case.contraction == "gradient_w":
        return choose_gradient_tiles(d_in, d_out, target=target, itemsize=itemsize)
    if case.format in ("bf16", "float32"):
        shape = {"itemsize": itemsize, "gated": case.gated}
        return choose_tiles(mean, d_in, d_out, target=target, **shape)
    return choose_quantized_tiles(mean, d_out, target=target, gated=case.gated)


def ratio(case: CompiledCase, tiles: Tiles, device: Device) -> float:
    """Bytes moved over the least: x, the used experts' weights and the result, each once."""
    itemsize = 4 if case.format == "float32" else 2
    row_bytes = case.d_in * (1 if case.fp8_rows else itemsize)
    column_bytes = _column_bytes(case)
    group_sizes = _group_sizes(case)
    written = case.rows * case.d_out * itemsize
    used = int((group_sizes > 0).sum())
    least = case.rows * row_bytes + used * case.d_out * column_bytes + written

    cache = _Cache(device.l2_bytes)
    groups, rows = _tiles(group_sizes, tiles.rows)
    longest = max(1, SWEEP_BYTES // int(tiles.rows * row_bytes))
    order = list(_order(groups, -(-case.d_out // tiles.columns), longest))
    for wave in range(0, len(order), device.num_cores):
        blocks = {}
        for tile, column in order[wave : wave + device.num_cores]:
            width = min(tiles.columns, case.d_out - column * tiles.columns)
            blocks["x", tile, 0] = rows[tile] * row_bytes
            blocks["w", groups[tile], column] = width * column_bytes
        cache.read(blocks)
    return (cache.missed + written) / least


def _order(groups: list[int], columns: int, longest: int) -> Iterator[tuple[int, int]]:
    """(tile, block of columns) of each program, in the order that `place` gives them."""
    for _, of_group in itertools.groupby(range(len(groups)), key=groups.__getitem__):
        tiles = list(of_group)
        for first in range(0, len(tiles), longest):
            sweep = tiles[first : first + longest]
            yield from ((tile, column) for column in range(columns) for tile in sweep)


def _column_bytes(case: CompiledCase) -> float:
    """Of one output's weights and scales, or two where gated."""
    matrices = 2 if case.gated else 1
    if case.format in ("bf16", "float32"):
        return matrices * case.d_in * (4 if case.format == "float32" else 2)
    return matrices * (case.d_in * FORMATS[case.format].bits / 8 + case.d_in / 128 * 4)


def _group_sizes(case: CompiledCase) -> np.ndarray:
    """Each row's expert drawn by lot."""
    even = np.full(case.num_groups, 1.0 / case.num_groups)
    return np.random.RandomState(0).multinomial(case.rows, even)


def _tiles(group_sizes: np.ndarray, tile_rows: int) -> tuple[list[int], list[int]]:
    """The group and the rows of each tile."""
    groups, rows = [], []
    for group, size in enumerate(group_sizes):
        for first in range(0, int(size), tile_rows):
            groups.append(group)
            rows.append(min(tile_rows, int(size) - first))
    return groups, rows


class _Cache:
    """Keeps what was read last."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held, self.missed = capacity, 0.0, 0.0
        self.blocks: OrderedDict[tuple, float] = OrderedDict()

    def read(self, wave: dict[tuple, float]) -> None:
        for key, size in wave.items():
            if key not in self.blocks:
                self.missed += size
                self.held += size
            self.blocks[key] = size
            self.blocks.move_to_end(key)
        while self.held > self.capacity:
            self.held -= self.blocks.popitem(last=False)[1]
