"""grouped_matmul by the native CPU kernels (kernels/native/src/grouped_matmul.cc); float32.

Groups are multiplied as they lie, without padding, in blocks that fit the caches; the blocks are
shared out over XLA's threads. R rows, E groups, D input width, F output width.
"""

import jax
import jax.numpy as jnp

from kernels import native
from kernels.grouped_matmul.contractions import differentiable


def rows_times_matrix(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, /, *, transpose: bool
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose; zero for rows past the last group."""
    width = w_EDF.shape[1 if transpose else 2]
    result = jax.ShapeDtypeStruct((x_RD.shape[0], width), jnp.float32)
    sizes_E = group_sizes_E.astype(jnp.int32)
    return native.call(
        "moesaic_rows_times_matrix", result, x_RD, w_EDF, sizes_E, transpose=transpose
    )


def rows_times_rows(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, /) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]."""
    shape = (group_sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return native.call(
        "moesaic_rows_times_rows", result, x_RD, dy_RF, group_sizes_E.astype(jnp.int32)
    )


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)
