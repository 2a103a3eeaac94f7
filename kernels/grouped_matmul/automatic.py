"""grouped_matmul by the best implementation of the platform that the program is compiled for.

The platform is known when the program is lowered, not when it is traced: a program for a GPU
cluster can be planned on a machine that has only a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import native
from kernels.grouped_matmul import cpu, xla
from kernels.grouped_matmul.contractions import differentiable


def rows_times_matrix(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, /, *, transpose: bool
) -> jax.Array:
    """x[r] @ w[group of r], or its transpose."""
    plain = partial(xla.rows_times_matrix, transpose=transpose)
    if not _has_native(x_RD):
        return plain(x_RD, w_EDF, group_sizes_E)
    ours = partial(cpu.rows_times_matrix, transpose=transpose)
    return lax.platform_dependent(x_RD, w_EDF, group_sizes_E, cpu=ours, default=plain)


def rows_times_rows(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, /) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]."""
    if not _has_native(x_RD):
        return xla.rows_times_rows(x_RD, dy_RF, group_sizes_E)
    return lax.platform_dependent(
        x_RD, dy_RF, group_sizes_E, cpu=cpu.rows_times_rows, default=xla.rows_times_rows
    )


def _has_native(x_RD: jax.Array) -> bool:
    """Whether a program for the CPU would use the native kernels; where the CPU is not what this
    process computes on, nobody is told that they are missing.
    """
    is_cpu = jax.default_backend() == "cpu"
    return is_cpu and x_RD.dtype == jnp.float32 and native.is_available()


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)
