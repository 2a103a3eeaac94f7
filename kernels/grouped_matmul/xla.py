"""grouped_matmul in plain XLA that does only the work the groups ask for.

A scan over the experts, whose matrices it reads in order, holds a loop over row tiles whose trip
count is the expert's own: ceil(group_size / tile). Tiles are not aligned to group borders. The
forward needs no mask, because tiles run in ascending order and a tile that spills into the next
group is overwritten by that group's first tile. Reverse-mode cannot cross a loop of dynamic length,
so both backward contractions are written out.

R rows, E groups (experts), D input width, F output width, M rows of a tile.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul.contractions import differentiable

MIN_TILE, MAX_TILE = 16, 128


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: the power of two nearest above half the mean group, within the bounds.

    Smaller tiles waste fewer padded rows, larger ones run nearer to a dense product.
    """
    mean = num_rows // num_groups
    tile = MIN_TILE
    while tile < MAX_TILE and tile * 2 <= mean:
        tile *= 2
    return tile


def rows_times_matrix(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, /, *, transpose: bool
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose: the forward and the gradient of x."""
    num_rows, num_groups = x_RD.shape[0], w_EDF.shape[0]
    tile = tile_rows(num_rows, num_groups)
    contracted, kept = (1, 1) if transpose else (0, 2)
    d_out = w_EDF.shape[kept]
    padded_xD = jnp.pad(x_RD, ((0, tile), (0, 0)))

    def one_expert(y_xF, expert):
        w_DF, start, size = expert

        def one_tile(i, y_xF):
            row = start + i * tile
            x_MD = lax.dynamic_slice_in_dim(padded_xD, row, tile)
            y_MF = lax.dot_general(
                x_MD,
                w_DF,
                (((1,), (contracted,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return lax.dynamic_update_slice_in_dim(y_xF, y_MF.astype(y_xF.dtype), row, 0)

        return lax.fori_loop(0, _num_tiles(size, tile), one_tile, y_xF), None

    y_xF = jnp.zeros((num_rows + tile, d_out), x_RD.dtype)
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    return lax.scan(one_expert, y_xF, (w_EDF, starts_E, group_sizes_E))[0][:num_rows]


def rows_times_rows(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, /) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]: the gradient of w."""
    num_rows, num_groups = x_RD.shape[0], group_sizes_E.shape[0]
    tile = tile_rows(num_rows, num_groups)
    padded_xD = jnp.pad(x_RD, ((0, tile), (0, 0)))
    padded_xF = jnp.pad(dy_RF, ((0, tile), (0, 0)))

    def one_expert(_, expert):
        start, size = expert

        def one_tile(i, dw_DF):
            row = start + i * tile
            is_ours_M1 = (i * tile + jnp.arange(tile) < size)[:, None]
            x_MD = jnp.where(is_ours_M1, lax.dynamic_slice_in_dim(padded_xD, row, tile), 0)
            dy_MF = lax.dynamic_slice_in_dim(padded_xF, row, tile)
            return dw_DF + lax.dot_general(
                x_MD, dy_MF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        zero_DF = jnp.zeros((x_RD.shape[1], dy_RF.shape[1]), jnp.float32)
        dw_DF = lax.fori_loop(0, _num_tiles(size, tile), one_tile, zero_DF)
        return None, dw_DF.astype(x_RD.dtype)

    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    return lax.scan(one_expert, None, (starts_E, group_sizes_E))[1]


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)


def _num_tiles(size: jax.Array, tile: int) -> jax.Array:
    """Tiles that cover `size` rows."""
    return (size + tile - 1) // tile
