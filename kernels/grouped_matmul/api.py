"""The signature of grouped_matmul, its checks, and the choice of an implementation.

R rows sorted by group, E groups (experts), D input width, F output width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import automatic, cpu, reference, xla
from kernels.grouped_matmul.contractions import GroupedMatmul

Implementation = Literal["auto", "reference", "xla", "cpu"]

_IMPLEMENTATIONS: dict[Implementation, GroupedMatmul] = {
    "auto": automatic.grouped_matmul,
    "reference": reference.grouped_matmul,
    "xla": xla.grouped_matmul,
    "cpu": cpu.grouped_matmul,
}


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns y[r] = x[r] @ w[group of r], [R, F] in x's dtype, with sums in float32.

    Group e owns the group_sizes[e] rows after those of the groups before it. Rows past the last
    group are unspecified but finite for finite input: mask them, and their cotangents must be 0.

    Args:
      x_RD: float [R, D], rows sorted by group.
      w_EDF: float [E, D, F], x's dtype.
      group_sizes_E: int32 [E], each >= 0, summing to at most R.
      implementation: "reference" multiplies every row with every matrix; "xla" does only the work
        that the groups ask for; "cpu" is C++ (float32, built with the installation); "auto" takes
        "cpu" where it runs and "xla" elsewhere.
    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the implementation asked for can't do this here.
    Numerics: float32 within 1e-5 relative of the reference (the order of sums differs).
    """
    rows, groups = x_RD.shape, w_EDF.shape
    if x_RD.ndim != 2 or w_EDF.ndim != 3 or rows[1] != groups[1]:
        raise ValueError(f"x {rows} must be [R, D] and w {groups} [E, D, F] with the same D")
    if group_sizes_E.shape != groups[:1]:
        raise ValueError(
            f"group_sizes {group_sizes_E.shape} must have one entry per matrix of w {groups}"
        )
    if x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"x is {x_RD.dtype}, w is {w_EDF.dtype}: cast one to the other's dtype")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes_E.dtype}")
    if implementation == "cpu" and x_RD.dtype != jnp.float32:
        raise NotImplementedError(f"the CPU kernels multiply float32, x is {x_RD.dtype}")
    return _IMPLEMENTATIONS[implementation](x_RD, w_EDF, group_sizes_E)
