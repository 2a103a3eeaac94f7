"""Tiles of tokens that share a row, found by XLA: what the programs of a GPU kernel are handed.

T tokens, R rows, S slots of a row, N tiles of M tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.cached_attention.state import Options, State


class Tiles(NamedTuple):
    """int32; a tile without tokens has no blocks."""

    tokens_NM: Any
    """-1 where a tile has fewer."""
    positions_NM: Any
    """-1 there."""
    rows_N: Any
    sink_blocks_N: Any
    """Blocks of slots with sink tokens, from the first on, that lie apart from the others."""
    first_blocks_N: Any
    """The first of the others."""
    counts_N: Any
    """Blocks in all."""


def cut(
    rows_T: jax.Array,
    positions_T: jax.Array,
    state: State,
    options: Options,
    size: int,
    block: int,
) -> Tiles:
    """Returns tiles of up to `size` tokens, with the blocks of slots that they may see.

    The tiles of a row depend on no other row's tokens, and have them in their order.
    """
    is_real_T = (rows_T >= 0) & (positions_T >= 0)
    if options.one_per_row:
        rows_N = jnp.arange(len(rows_T), dtype=jnp.int32)
        tokens_NM = jnp.where(is_real_T, rows_N, -1)[:, None]
    else:
        tokens_NM, rows_N = _by_row(jnp.where(is_real_T, rows_T, -1), state.num_rows, size)
    positions_NM = jnp.where(tokens_NM < 0, -1, positions_T[tokens_NM])
    blocks = _blocks(positions_NM, rows_N, state, options, block)
    return Tiles(tokens_NM, positions_NM, rows_N, *(x.astype(jnp.int32) for x in blocks))


def num_tiles(num_tokens: int, num_rows: int, size: int) -> int:
    """The most tiles that so many tokens make: each row's last one may lack tokens."""
    return (num_tokens + min(num_rows, num_tokens) * (size - 1)) // size


def _by_row(rows_T: jax.Array, num_rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [N, M] of each tile and its row [N]; row -1 is padding."""
    token_T, row_R = (jnp.arange(n, dtype=jnp.int32) for n in (len(rows_T), num_rows))
    # A sort by rows would be several kernels; one that compares all pairs takes less.
    is_before_TT = (rows_T[:, None] == rows_T[None]) & (token_T[:, None] > token_T[None])
    tile_T, place_T = jnp.divmod(is_before_TT.sum(axis=1, dtype=jnp.int32), size)
    tiles_R = -(-(rows_T[None] == row_R[:, None]).sum(axis=1, dtype=jnp.int32) // size)
    ends_R = jnp.cumsum(tiles_R)
    tile_N = jnp.arange(num_tiles(len(rows_T), num_rows, size), dtype=jnp.int32)
    rows_N = (ends_R[None] <= tile_N[:, None]).sum(axis=1, dtype=jnp.int32)
    at_T = jnp.where(rows_T < 0, len(tile_N), (ends_R - tiles_R)[rows_T] + tile_T)
    none_NM = jnp.full((len(tile_N), size), -1, jnp.int32)
    tokens_NM = none_NM.at[at_T, place_T].set(token_T, mode="drop")
    return tokens_NM, jnp.where(rows_N < num_rows, rows_N, 0)


def _blocks(
    positions_NM: jax.Array, rows_N: jax.Array, state: State, options: Options, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks that only hold sink tokens, the first of the others, and how many there are in all."""
    none, sinks = jnp.iinfo(jnp.int32).max, options.num_sink_tokens
    last_N = positions_NM.max(axis=1)
    nearest_N = jnp.zeros_like(last_N)
    if options.window_size is not None:
        first_N = jnp.where(positions_NM < 0, none, positions_NM).min(axis=1)
        nearest_N = jnp.maximum(first_N - (options.window_size - 1), 0)
    if state.slot_positions_RS is None:
        first_block_N, end_N = nearest_N // block, (last_N + block) // block
        sink_blocks_N = jnp.minimum(-(-sinks // block), first_block_N)
    else:  # slots are in any order: from the first one that is seen to the last
        held_NS = state.slot_positions_RS[rows_N]
        is_near_NS = (held_NS >= nearest_N[:, None]) | (held_NS < sinks)
        is_seen_NS = (held_NS >= 0) & (held_NS <= last_N[:, None]) & is_near_NS
        slot_S = jnp.arange(held_NS.shape[1], dtype=jnp.int32)[None]
        first_block_N = jnp.where(is_seen_NS, slot_S, none).min(axis=1) // block
        end_N = (jnp.where(is_seen_NS, slot_S, -1).max(axis=1) + block) // block
        sink_blocks_N = jnp.zeros_like(last_N)
    count_N = jnp.maximum(end_N - first_block_N, 0) + sink_blocks_N
    return sink_blocks_N, first_block_N, jnp.where(last_N < 0, 0, count_N)
