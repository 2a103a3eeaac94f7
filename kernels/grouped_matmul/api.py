"""The signature of grouped_matmul, its checks, and the choice of an implementation.

R rows sorted by group, E groups (experts), D input width, F output width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.backend import current_target, prefers_mosaic, require_mosaic, takes_triton
from kernels.grouped_matmul import automatic, cpu, pallas_mosaic, pallas_triton, reference, xla
from kernels.grouped_matmul.contractions import GroupedMatmul

Implementation = Literal["auto", "reference", "xla", "cpu", "triton", "mosaic"]

MOSAIC_ROWS = 128
"""Of a group on average, from which "auto" takes Mosaic's kernel: its tiles have so many."""

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
        that the groups ask for; "cpu" is C++ (float32, built with the installation); "triton" is a
        GPU kernel; "mosaic" is one for Hopper alone (bfloat16, D and F multiples of 64), with
        w's gradient of "triton"; "auto" takes "mosaic", for many rows, or "triton", whichever was
        measured to be faster (kernels/backend.py), or "cpu", where it runs, and "xla" elsewhere.
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
    if implementation == "mosaic":
        return pallas_mosaic.grouped_matmul(x_RD, w_EDF, group_sizes_E, target=require_mosaic())
    if takes_triton(implementation):
        is_mosaic = implementation == "auto" and mosaic_is_faster(x_RD, w_EDF, rows[0])
        chosen = pallas_mosaic if is_mosaic else pallas_triton
        return chosen.grouped_matmul(x_RD, w_EDF, group_sizes_E, target=current_target())
    return _IMPLEMENTATIONS[implementation](x_RD, w_EDF, group_sizes_E)


def mosaic_is_faster(x_TD: jax.Array, w_EDF: jax.Array, num_rows: int) -> bool:
    """Whether "auto" means Mosaic's kernel, where it means a kernel, for so many sorted rows."""
    target = current_target()
    if not prefers_mosaic("grouped_matmul/bf16", target):
        return False
    has_many_rows = num_rows >= MOSAIC_ROWS * w_EDF.shape[0]
    return has_many_rows and pallas_mosaic.unsupported_reason(x_TD, w_EDF, target) is None
