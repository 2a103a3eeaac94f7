"""cached_attention by tiles of tokens, each against one row after the other that it has tokens of.

A row's slots are read once for all tokens of a tile, and scores are a tile's alone. Where every
token has its own row (`one_per_row`), the rows are read where they lie.

T tokens, M tokens of a tile, H query heads, C head_dim, W width of values.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.cached_attention.reference import attend
from kernels.cached_attention.state import Options, State

TILE = 32
"""Tokens of a tile where some row has several: of a chunk of a prompt."""


def cached_attention(
    q_THC: jax.Array,
    rows_T: jax.Array,
    positions_T: jax.Array,
    state: State,
    sink_logits_H: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Returns the attention of each token over its row's slots, [T, H, W]."""
    num_tokens, heads, _ = q_THC.shape

    def attend_row(q_MHC: jax.Array, positions_M: jax.Array, row: jax.Array) -> jax.Array:
        slots = state.row(row, options.value_width, q_MHC.dtype)
        return attend(q_MHC, positions_M, slots, sink_logits_H, options)

    positions_T = jnp.where(rows_T < 0, -1, positions_T)
    if options.one_per_row:
        row_T = jnp.arange(num_tokens)
        return jax.vmap(attend_row)(q_THC[:, None], positions_T[:, None], row_T)[:, 0]

    def attend_tile(tile: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_MHC, rows_M, positions_M = tile

        def next_row(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            out_MHW, is_left_M = carry
            row = rows_M[jnp.argmax(is_left_M)]
            is_here_M = is_left_M & (rows_M == row)
            here_MHW = attend_row(q_MHC, jnp.where(is_here_M, positions_M, -1), row)
            out_MHW = jnp.where(is_here_M[:, None, None], here_MHW, out_MHW)
            return out_MHW, is_left_M & ~is_here_M

        none_MHW = jnp.zeros((len(q_MHC), heads, options.value_width), q_MHC.dtype)
        start = (none_MHW, positions_M >= 0)
        return lax.while_loop(lambda carry: carry[1].any(), next_row, start)[0]

    size = 1 if num_tokens <= state.num_rows else min(TILE, num_tokens)
    count = -(-num_tokens // size)
    padding = count * size - num_tokens

    def tiled(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:])), constant_values=-1)
        return padded.reshape(count, size, *x.shape[1:])

    out_NMHW = lax.map(attend_tile, (tiled(q_THC), tiled(rows_T), tiled(positions_T)))
    return out_NMHW.reshape(count * size, heads, options.value_width)[:num_tokens]
