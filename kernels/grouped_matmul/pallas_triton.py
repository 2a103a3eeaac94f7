"""grouped_matmul as Triton kernels: one program per tile of rows and block of columns.

A table built beside the kernel says which group each tile belongs to (tiles.py), so that the grid
has no group dimension: there are as many programs as tiles, a few of which may be idle. Tiles don't
cross group borders: what lies beyond a border is not written.

T rows of x, R rows sorted by group, E groups (experts), D input width, F output width; a tile is M
rows, K of the contraction at a time, and N columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load, mask_of, span, store
from kernels.grouped_matmul.request import GATE_AND_UP
from kernels.grouped_matmul.tiles import (
    Tiles,
    choose_gradient_tiles,
    choose_tiles,
    columns_of_strip,
    place,
    read_rows,
    rows_of,
    tile_table,
    write_rows,
)


class Plan(NamedTuple):
    """What a call needs to know besides its arrays."""

    target: Target
    tiles: Tiles | None
    """None: chosen by the shapes."""
    gated: bool = False
    gradient_tiles: Tiles | None = None


def grouped_matmul(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    target: Target,
    tiles: Tiles | None = None,
    gradient_tiles: Tiles | None = None,
) -> jax.Array:
    """Returns y[r] = x[rows[r]] @ w[group of r], [R, F], and zero for rows past the last group.

    Differentiable in x and w.

    Args:
      rows_R: int32 in [0, T), the row of x that each sorted row is: gathered in the kernel, so that
        no sorted copy of x is made. None: x is sorted, and R is T.
      tiles, gradient_tiles: of both rows times matrices, and of the matrices' gradient; None:
        chosen by the shapes.
    """
    plan = Plan(target, tiles, gradient_tiles=gradient_tiles)
    return _grouped_matmul(plan, x_TD, w_EDF, group_sizes_E, rows_R)


def grouped_swiglu(
    x_TD: jax.Array,
    w_gate_up_ED2F: jax.Array,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    target: Target,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Returns silu(gate) * up with [gate, up] = x[rows[r]] @ w[group of r], [R, F].

    Gate and up stay float32 until their product, and never reach memory; where a gradient is
    taken they do, in x's dtype: making them again would add two products to a layer's nine.

    Args:
      w_gate_up_ED2F: [E, D, 2 F], the F columns of the gate before those of up.
      Others as in `grouped_matmul`.
    """
    return _grouped_swiglu(Plan(target, tiles, True), x_TD, w_gate_up_ED2F, group_sizes_E, rows_R)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan, x_TD, w_EDF, group_sizes_E, rows_R):
    return _rows_times_matrix(plan, x_TD, w_EDF, group_sizes_E, rows_R)


def _forward(plan, x_TD, w_EDF, group_sizes_E, rows_R):
    y_RF = _grouped_matmul(plan, x_TD, w_EDF, group_sizes_E, rows_R)
    return y_RF, (x_TD, w_EDF, group_sizes_E, rows_R)


def _backward(plan, residuals, dy_RF):
    x_TD, w_EDF, group_sizes_E, rows_R = residuals
    dx_RD = _rows_times_matrix(plan, dy_RF, w_EDF, group_sizes_E, None, transpose=True)
    x_RD = x_TD if rows_R is None else x_TD[rows_R]
    dw_EDF = _rows_times_rows(plan, x_RD, dy_RF, group_sizes_E)
    return scatter_rows(dx_RD, rows_R, x_TD), dw_EDF.astype(w_EDF.dtype), None, None


_grouped_matmul.defvjp(_forward, _backward)


def scatter_rows(dx_RD: jax.Array, rows_R: jax.Array | None, x_TD: jax.Array) -> jax.Array:
    """The gradient of x from those of its sorted rows: sums, in float32, of each row's copies."""
    if rows_R is None:
        return dx_RD
    zeros_TD = jnp.zeros(x_TD.shape, jnp.float32)
    return zeros_TD.at[rows_R].add(dx_RD.astype(jnp.float32)).astype(x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(plan, x_TD, w_ED2F, group_sizes_E, rows_R):
    return _rows_times_matrix(plan, x_TD, w_ED2F, group_sizes_E, rows_R)


def _swiglu_forward(plan, x_TD, w_ED2F, group_sizes_E, rows_R):
    h_R2F = _grouped_matmul(plan._replace(gated=False), x_TD, w_ED2F, group_sizes_E, rows_R)
    h_R2F = checkpoint_name(jnp.asarray(h_R2F), GATE_AND_UP)
    return swiglu_of_halves(h_R2F), (x_TD, w_ED2F, group_sizes_E, rows_R, h_R2F)


def _swiglu_backward(plan, residuals, dy_RF):
    *operands, h_R2F = residuals
    (dh_R2F,) = jax.vjp(swiglu_of_halves, h_R2F)[1](dy_RF)
    return _backward(plan._replace(gated=False), operands, dh_R2F)


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gate * sigmoid(gate) * up (Shazeer 2020), float32."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def swiglu_of_halves(h_R2F: jax.Array) -> jax.Array:
    """The same of the first and the second half of the columns, in float32 and back.

    Where a gradient is taken it is of this form: swiglu's is 0 * inf for gates below -88.
    """
    gate_RF, up_RF = jnp.split(h_R2F.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate_RF) * up_RF).astype(h_R2F.dtype)


# --- Rows times a matrix: the forward pass and the gradient of x ---------------------------------


def _rows_times_matrix(
    plan: Plan,
    x_TD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    rows_R: jax.Array | None,
    transpose: bool = False,
) -> jax.Array:
    """x[r] @ w[group of r], [R, F]; transpose: with its transpose; gated: silu(gate) * up."""
    num_groups, d_in = w_EDF.shape[0], w_EDF.shape[2 if transpose else 1]
    d_out = w_EDF.shape[1 if transpose else 2] // (2 if plan.gated else 1)
    num_rows = x_TD.shape[0] if rows_R is None else rows_R.shape[0]
    tiles = plan.tiles or choose_tiles(
        num_rows // num_groups,
        d_in,
        d_out,
        target=plan.target,
        itemsize=x_TD.dtype.itemsize,
        gated=plan.gated,
    )
    table = tile_table(group_sizes_E, num_rows, tiles, d_in * x_TD.dtype.itemsize)
    run = backend.triton_call(
        functools.partial(_product_kernel, tiles=tiles, transpose=transpose, gated=plan.gated),
        name="grouped_matmul_dx" if transpose else "grouped_matmul",
        num_programs=len(table.group_P) * pl.cdiv(d_out, tiles.columns),
        out_shape=jax.ShapeDtypeStruct((num_rows, d_out), x_TD.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        target=plan.target,
    )
    return run(table, rows_R, x_TD, w_EDF)


def _product_kernel(table, rows_R, x_TD, w_EDF, y_RF, *, tiles, transpose, gated):
    (num_rows, d_out), d_in = y_RF.shape, x_TD.shape[1]
    num_groups, num_columns = w_EDF.shape[0], pl.cdiv(d_out, tiles.columns)
    group, first, end, column = place(pl.program_id(0), table, num_columns)
    start = column * tiles.columns
    zeros_MN = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)

    @pl.when(group == num_groups)
    def _no_group():
        write_rows(y_RF, zeros_MN, first, end, start)

    @pl.when(group < num_groups)
    def _multiply():
        rows_M = rows_of(tiles, first, num_rows, rows_R)
        is_column_N = edge(start, tiles.columns, d_out)

        def step(k, sums):
            inputs, is_input_K = k * tiles.depth, edge(k * tiles.depth, tiles.depth, d_in)
            x_MK = read_rows(x_TD, rows_M, span(inputs, tiles.depth), is_input_K)

            def add(half, sum_MN):
                rows = pl.ds(inputs, tiles.depth)
                columns = pl.ds(start + half * d_out, tiles.columns)
                if not transpose:
                    mask = mask_of((tiles.depth, tiles.columns), is_input_K, is_column_N)
                    return sum_MN + dot(x_MK, load(w_EDF.at[group, rows, columns], mask))
                mask = mask_of((tiles.columns, tiles.depth), is_column_N, is_input_K)
                return sum_MN + dot(x_MK, load(w_EDF.at[group, columns, rows], mask).T)

            return tuple(add(half, sum_MN) for half, sum_MN in enumerate(sums))

        sums = (zeros_MN,) * (2 if gated else 1)
        sums = lax.fori_loop(0, pl.cdiv(d_in, tiles.depth), step, sums)
        write_rows(y_RF, swiglu(*sums) if gated else sums[0], first, end, start)


# --- Rows times rows: the gradient of the matrices -----------------------------------------------


def _rows_times_rows(
    plan: Plan, x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """sum over the group's rows of x[r]^T dy[r], [E, D, F]."""
    num_groups, d_in, d_out = group_sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1]
    tiles = plan.gradient_tiles or choose_gradient_tiles(
        d_in, d_out, target=plan.target, itemsize=x_RD.dtype.itemsize
    )
    ends_E = jnp.cumsum(group_sizes_E).astype(jnp.int32)
    blocks = pl.cdiv(d_in, tiles.rows) * pl.cdiv(d_out, tiles.columns)
    strip = columns_of_strip(x_RD.shape[0] // num_groups, tiles, x_RD.dtype.itemsize)
    run = backend.triton_call(
        functools.partial(_gradient_kernel, tiles=tiles, strip=strip),
        name="grouped_matmul_dw",
        num_programs=num_groups * blocks,
        out_shape=jax.ShapeDtypeStruct((num_groups, d_in, d_out), x_RD.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        target=plan.target,
    )
    return run(ends_E - group_sizes_E.astype(jnp.int32), ends_E, x_RD, dy_RF)


def _gradient_kernel(starts_E, ends_E, x_RD, dy_RF, dw_EDF, *, tiles, strip):
    """One block [M, N] of one group's gradient, over the rows K of the group."""
    _, d_in, d_out = dw_EDF.shape
    num_rows, num_columns = pl.cdiv(d_in, tiles.rows), pl.cdiv(d_out, tiles.columns)
    group, block = divide(pl.program_id(0), num_rows * num_columns)
    i, j = _place_in_strips(block, num_rows, num_columns, strip)
    start, end = starts_E[group], ends_E[group]
    rows, columns = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns)
    is_row_M = edge(i * tiles.rows, tiles.rows, d_in)
    is_column_N = edge(j * tiles.columns, tiles.columns, d_out)

    def step(k, dw_MN):
        first = start + k * tiles.depth
        ours, is_ours_K = pl.ds(first, tiles.depth), span(first, tiles.depth) < end
        x_KM = load(x_RD.at[ours, rows], mask_of((tiles.depth, tiles.rows), is_ours_K, is_row_M))
        mask_KN = mask_of((tiles.depth, tiles.columns), is_ours_K, is_column_N)
        return dw_MN + dot(x_KM.T, load(dy_RF.at[ours, columns], mask_KN))

    zeros_MN = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    steps, _ = divide(end - start + tiles.depth - 1, tiles.depth)
    dw_MN = lax.fori_loop(0, steps, step, zeros_MN)
    mask_MN = mask_of(dw_MN.shape, is_row_M, is_column_N)
    store(dw_EDF.at[group, rows, columns], dw_MN, mask_MN)


def _place_in_strips(
    block: jax.Array, num_rows: int, num_columns: int, strip: int
) -> tuple[jax.Array, jax.Array]:
    """Row and column of a group's block: strip by strip of columns, each from row to row."""
    if strip >= num_columns:
        return divide(block, num_columns)
    strip_index, in_strip = divide(block, num_rows * strip)
    first = strip_index * strip
    i, j = divide(in_strip, jnp.minimum(strip, num_columns - first))
    return i, first + j
