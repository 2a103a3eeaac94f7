"""grouped_matmul by the best implementation of the platform that the program is compiled for.

The platform is known when the program is lowered, not when it is traced: a program for a GPU
cluster can be planned on a machine that has only a CPU.
"""

from functools import partial

import jax
from jax import lax

from kernels import native
from kernels.grouped_matmul import cpu, xla
from kernels.grouped_matmul.contractions import differentiable


def _is_native(x_RD: jax.Array) -> bool:
    return native.is_used_for(x_RD) or native.takes_bfloat16(x_RD.dtype, is_grouped=True)


def rows_times_matrix(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, /, *, transpose: bool
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose."""
    plain = partial(xla.rows_times_matrix, transpose=transpose)
    if not _is_native(x_RD):
        return plain(x_RD, w_EDF, group_sizes_E)
    ours = partial(cpu.rows_times_matrix, transpose=transpose)
    return lax.platform_dependent(x_RD, w_EDF, group_sizes_E, cpu=ours, default=plain)


def rows_times_rows(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, /) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]."""
    if not _is_native(x_RD):
        return xla.rows_times_rows(x_RD, dy_RF, group_sizes_E)
    return lax.platform_dependent(
        x_RD, dy_RF, group_sizes_E, cpu=cpu.rows_times_rows, default=xla.rows_times_rows
    )


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)
