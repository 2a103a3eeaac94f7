"""Tiles of rows that belong to one group each: how large they are, and how kernels reach them.

T rows of x, R rows sorted by group, E groups, P tiles (places in the grid's order); a tile has M
rows, read K columns at a time and written N.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.backend import Target, divide, edge, load, mask_of, span, store

SWEEP_BYTES = 32 * 2**20
"""Of x that is read again and again for the columns of one sweep: most of the L2 of an A100 (40 MB)
or an H100 (50 MB), chosen by compile_checks/traffic.py."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What one program of a kernel works on at a time; each a power of two, at least 16."""

    rows: int
    columns: int
    depth: int
    """Of the contraction, per step of its loop."""
    num_warps: int = 4
    num_stages: int = 3


class TileTable(NamedTuple):
    """What each tile works on, int32 [P]: rows from the first to before the end, of the group.

    Every row lies in exactly one tile. Rows past the last group have the group E; so do tiles that
    are left over, which have no rows.
    """

    group_P: jax.Array
    first_row_P: jax.Array
    end_row_P: jax.Array
    sweep_P: jax.Array
    """First tile of the tile's sweep: tiles of one group that go together over all columns, so that
    a block of the weights is read once for them while their rows of x stay in L2."""
    sweep_size_P: jax.Array
    """Tiles of the sweep."""


class Place(NamedTuple):
    """Of a program, int32."""

    group: jax.Array
    first_row: jax.Array
    end_row: jax.Array
    column: jax.Array
    """Its block of columns."""


def choose_tiles(
    mean_rows: int, d_in: int, d_out: int, *, target: Target, itemsize: int = 2, gated: bool = False
) -> Tiles:
    """Returns tiles for a group of mean_rows rows, none of which spills (compiled.json).

    Few rows are a matter of reading weights: tiles that waste few rows, and deep steps. Many are a
    matter of tensor cores, which Hopper feeds from 64 rows on.

    Args:
      itemsize: bytes of an element; float32 goes without tensor cores.
      gated: two products at a time, each with its own sums.
    """
    if target.platform == "interpret":
        tiles = Tiles(rows=16, columns=32, depth=16)
    elif itemsize == 4:
        tiles = Tiles(rows=64 if mean_rows > 16 else 16, columns=64, depth=16)
    elif mean_rows <= 16:
        tiles = Tiles(rows=16, columns=64, depth=128, num_stages=4)
    elif mean_rows <= 32:
        tiles = Tiles(rows=32, columns=128, depth=64)
    elif mean_rows <= 128 or (gated and target.capability < 90):  # two sums: half the rows
        tiles = Tiles(rows=64, columns=128, depth=64, num_warps=8)
    elif not gated and d_in > d_out and mean_rows * d_in * itemsize > SWEEP_BYTES // 2:
        # A group's rows are read again for the columns that don't run at once with the first ones
        # (Mixtral's down projection): wide tiles leave fewer of them.
        tiles = Tiles(rows=128, columns=256, depth=64, num_warps=8)
    else:
        tiles = Tiles(rows=128, columns=128, depth=64, num_warps=8)
    return replace(tiles, columns=_at_most(tiles.columns, d_out), depth=_at_most(tiles.depth, d_in))


def choose_quantized_tiles(
    mean_rows: int, d_out: int, *, target: Target, gated: bool = False
) -> Tiles:
    """As `choose_tiles`, for weights of few bits; a kernel fits the depth to their blocks."""
    if target.platform == "interpret":
        tiles = Tiles(rows=16, columns=32, depth=16)
    elif mean_rows <= 16:
        tiles = Tiles(rows=16, columns=64, depth=128, num_stages=4)
    elif mean_rows <= 32:
        tiles = Tiles(rows=32, columns=128, depth=64)
    elif mean_rows <= 128 or gated:
        tiles = Tiles(rows=64, columns=128, depth=64, num_warps=8)
    else:
        tiles = Tiles(rows=128, columns=128, depth=64, num_warps=8)
    return replace(tiles, columns=_at_most(tiles.columns, d_out))


def choose_gradient_tiles(d_in: int, d_out: int, *, target: Target, itemsize: int = 2) -> Tiles:
    """Returns tiles of a matrix's gradient, whose contraction is over the rows of a group."""
    if target.platform == "interpret":
        tiles = Tiles(rows=16, columns=32, depth=16)
    elif itemsize == 4:
        tiles = Tiles(rows=64, columns=64, depth=32)
    else:
        tiles = Tiles(rows=128, columns=128, depth=64, num_warps=8)
    return replace(tiles, rows=_at_most(tiles.rows, d_in), columns=_at_most(tiles.columns, d_out))


def columns_of_strip(mean_rows: int, tiles: Tiles, itemsize: int) -> int:
    """Blocks of columns of a matrix's gradient that go together over all its rows: so many that
    the part of dy they read stays in L2 while x passes by."""
    return max(1, SWEEP_BYTES // max(1, mean_rows * tiles.columns * itemsize))


def _at_most(size: int, needed: int) -> int:
    """size, or the power of two from 16 on that covers what is needed, if that is less."""
    return min(size, max(16, 1 << (needed - 1).bit_length()))


def max_tiles(num_rows: int, num_groups: int, tile_rows: int, alignment: int = 1) -> int:
    """The most tiles that any group sizes need: each group wastes less than one tile.

    And less than `alignment` rows before its first one.
    """
    groups = min(num_groups + 1, num_rows)  # one more: the rows past the last group
    return (num_rows + groups * (tile_rows - 1 + alignment - 1)) // tile_rows


def tile_table(
    group_sizes_E: jax.Array, num_rows: int, tiles: Tiles, row_bytes: int, alignment: int = 1
) -> TileTable:
    """Returns the tiles in the order of their rows, as many as `max_tiles` says.

    G = E + 1 groups: the last is the rows that no group owns. Sums over the groups before one, and
    what a tile asks of its group, are masked sums: on a GPU each is part of one of two small
    kernels, where prefix sums and gathers would be six.

    Args:
      row_bytes: of a row of x.
      alignment: tiles lie within tiles.rows rows that begin at a multiple of it, which divides
        tiles.rows. A group's first tile has fewer rows for it, where the group begins in between.
    """
    num_groups, size = group_sizes_E.shape[0], tiles.rows
    sizes_E = group_sizes_E.astype(jnp.int32)
    starts_G = _sums_before(sizes_E)
    sizes_G = jnp.pad(sizes_E, (0, 1))
    sizes_G = jnp.where(jnp.arange(num_groups + 1) < num_groups, sizes_G, num_rows - starts_G)
    bases_G, spans_G = starts_G, sizes_G
    if alignment > 1:
        bases_G = starts_G - starts_G % alignment
        spans_G = jnp.where(sizes_G > 0, starts_G + sizes_G - bases_G, 0)
    tiles_G = (spans_G + size - 1) // size
    tiles_E = (sizes_E + size - 1) // size if alignment == 1 else tiles_G[:-1]
    first_tiles_G = _sums_before(tiles_E)
    num_places = max_tiles(num_rows, num_groups, size, alignment)
    tile_P = jnp.arange(num_places, dtype=jnp.int32)
    is_ours_PG = (first_tiles_G[None] <= tile_P[:, None]) & (
        tile_P[:, None] < (first_tiles_G + tiles_G)[None]
    )

    def of_group(values_G: jax.Array, otherwise: int) -> jax.Array:
        """Each tile's group's value; `otherwise` of tiles that are left over."""
        shifted_PG = jnp.where(is_ours_PG, (values_G - otherwise)[None], 0)
        return shifted_PG.sum(axis=1, dtype=jnp.int32) + otherwise

    group_P = of_group(jnp.arange(num_groups + 1, dtype=jnp.int32), num_groups)
    place_P = tile_P - of_group(first_tiles_G, 0)  # among the group's tiles
    first_P = jnp.minimum(of_group(bases_G, num_rows) + place_P * size, num_rows)
    end_P = jnp.minimum(first_P + size, of_group(starts_G + sizes_G, num_rows))
    if alignment > 1:
        first_P = jnp.maximum(first_P, of_group(starts_G, num_rows))
    longest = max(1, SWEEP_BYTES // (size * row_bytes))
    in_sweep_P = place_P % longest
    rest_P = of_group(tiles_G, 0) - (place_P - in_sweep_P)  # of the group's, from the sweep on
    is_idle_P = first_P >= end_P  # a sweep by itself
    sweep_P = jnp.where(is_idle_P, tile_P, tile_P - in_sweep_P)
    sweep_size_P = jnp.where(is_idle_P, 1, jnp.minimum(rest_P, longest))
    return TileTable(group_P, first_P, end_P, sweep_P, sweep_size_P)


def _sums_before(values_E: jax.Array) -> jax.Array:
    """Sum of the values before each, and of all at the end: int32 [E + 1]."""
    count = values_E.shape[0]
    is_before_GE = jnp.arange(count)[None] < jnp.arange(count + 1)[:, None]
    return jnp.where(is_before_GE, values_E[None], 0).sum(axis=1, dtype=jnp.int32)


# --- Inside kernels ------------------------------------------------------------------------------


def place(program: jax.Array, table: TileTable, num_columns: int) -> Place:
    """What a program works on: those of a sweep take all its tiles for each block of columns."""
    # A sweep of n tiles has n * num_columns programs: this finds one of its tiles.
    some, _ = divide(program, num_columns)
    first = table.sweep_P[some]
    column, tile = divide(program - first * num_columns, table.sweep_size_P[some])
    tile += first
    rows = table.first_row_P[tile], table.end_row_P[tile]
    return Place(table.group_P[tile], *rows, column)


def rows_of(tiles: Tiles, first: jax.Array, num_rows: int, rows_R: Any | None = None) -> jax.Array:
    """The rows of x that a tile reads, int32 [M].

    Sorted rows past the last are read as the last one: what comes of them is never written.

    Args:
      rows_R: the row of x that each sorted row is; None where x itself is sorted.
    """
    rows_M = jnp.minimum(span(first, tiles.rows), num_rows - 1)
    return rows_M if rows_R is None else load(rows_R.at[rows_M])


def read_rows(
    x_TD: Any, rows_M: jax.Array, inputs_K: jax.Array, is_input_K: jax.Array | None = None
) -> jax.Array:
    """Columns of rows of x, [M, K]."""
    shape = (rows_M.shape[0], inputs_K.shape[0])
    at = (jnp.broadcast_to(rows_M[:, None], shape), jnp.broadcast_to(inputs_K[None], shape))
    return load(x_TD.at[at], mask_of(shape, columns=is_input_K))


def write_rows(
    y_RF: Any, y_MN: jax.Array, first: jax.Array, end: jax.Array, column: jax.Array
) -> None:
    """Writes the rows from first to before end, in the columns from `column` on."""
    rows, columns = y_MN.shape
    is_row_M = span(first, rows) < end
    mask_MN = mask_of(y_MN.shape, is_row_M, edge(column, columns, y_RF.shape[1]))
    store(y_RF.at[pl.ds(first, rows), pl.ds(column, columns)], y_MN, mask_MN)
