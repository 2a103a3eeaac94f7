"""grouped_matmul by the native CPU kernels (kernels/native/src); float32, or weights in bfloat16.

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
    fixed_order: bool = False,
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose; zero for rows past the last group.

    In a fixed order of sums a row's result has the same bits whatever rows there are beside it.
    """
    width = w_EDF.shape[1 if transpose else 2]
    result = jax.ShapeDtypeStruct((x_RD.shape[0], width), jnp.float32)
    sizes_E = group_sizes_E.astype(jnp.int32)
    return native.call(
        "moesaic_rows_times_matrix",
        result,
        x_RD,
        w_EDF,
        sizes_E,
        fixed_order=fixed_order,
        transpose=transpose,
    )


def rows_times_rows(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, /) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]."""
    shape = (group_sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return native.call(
        "moesaic_rows_times_rows", result, x_RD, dy_RF, group_sizes_E.astype(jnp.int32)
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
