"""grouped_matmul by the native CPU kernels (kernels/native/src); float32 and bfloat16.

Groups are multiplied as they lie, without padding, in blocks that fit the caches; the blocks are
shared out over XLA's threads. R rows, E groups, D input width, F output width.
"""

import jax
import jax.numpy as jnp

from kernels import native
from kernels.grouped_matmul.contractions import differentiable
from kernels.grouped_matmul.request import Activations

ACTIVATIONS: dict[Activations, int] = {"float": 0, "int8": 1, "auto": 2}
"""As the C++ counts them."""


def rows_times_matrix(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    /,
    *,
    transpose: bool,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose; zero for rows past the last group.

    A row's result has the same bits whatever rows there are beside it. Sums are float32.

    Args:
      x_RD, w_EDF: both float32; or x in bfloat16, and then w in float32 is rounded as it is read.
      dtype: of the result, that of x; of rows in bfloat16 also float32, the sums as they are.
    """
    width = w_EDF.shape[1 if transpose else 2]
    is_half = x_RD.dtype == jnp.bfloat16
    return native.call(
        "moesaic_half_rows_times_matrix" if is_half else "moesaic_rows_times_matrix",
        jax.ShapeDtypeStruct((x_RD.shape[0], width), dtype or x_RD.dtype),
        x_RD,
        w_EDF,
        group_sizes_E.astype(jnp.int32),
        transpose=transpose,
    )


def rows_times_rows(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    group_sizes_E: jax.Array,
    /,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F].

    Args:
      x_RD, dy_RF: both float32, or both bfloat16, whose sums are float32.
      dtype: as above.
    """
    shape = (group_sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1])
    is_half = x_RD.dtype == jnp.bfloat16
    return native.call(
        "moesaic_half_rows_times_rows" if is_half else "moesaic_rows_times_rows",
        jax.ShapeDtypeStruct(shape, dtype or x_RD.dtype),
        x_RD,
        dy_RF,
        group_sizes_E.astype(jnp.int32),
    )


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)


def rows_times_bfloat16(
    x_RK: jax.Array,
    weight: jax.Array,
    group_sizes_E: jax.Array,
    *,
    activations: Activations,
    fixed_order: bool,
    outputs_first: bool,
) -> jax.Array:
    """x[r] @ w[group of r] of float32 rows, where w stays in bfloat16 until it is in registers.

    Args:
      weight: bfloat16 [E, K, N], or outputs_first [E, N, K].
      activations: "auto" rounds many rows to bfloat16 where the processor multiplies tiles of it.
    """
    num_outputs = weight.shape[1 if outputs_first else 2]
    return native.call(
        "moesaic_bfloat16_matmul",
        jax.ShapeDtypeStruct((x_RK.shape[0], num_outputs), jnp.float32),
        x_RK,
        weight,
        group_sizes_E.astype(jnp.int32),
        activations=ACTIVATIONS[activations],
        fixed_order=fixed_order,
        outputs_first=outputs_first,
    )
