"""grouped_matmul with weights of few bits, as Triton kernels that widen them in registers.

The weights are the left operand of each product: an output's inputs lie together in memory, and
Hopper's tensor cores take a left operand from registers, where the widened weights are. So a tile's
sums are held outputs first, [N, M], and turned when stored. A scale multiplies the float32 sum over
its block of inputs, never a weight.

T rows of x, R rows sorted by group, E groups (experts), D input width, F output width, S blocks of
inputs; a tile is M rows, K of the contraction at a time, and N columns.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load, mask_of, span
from kernels.grouped_matmul.pallas_triton import Plan, scatter_rows, swiglu, swiglu_of_halves
from kernels.grouped_matmul.scaled_rows import BLOCK_SIZE, ScaledRows
from kernels.grouped_matmul.tiles import (
    Tiles,
    choose_quantized_tiles,
    place,
    read_rows,
    rows_of,
    tile_table,
    write_rows,
)
from kernels.quantize import QTensor

OLDEST_E4M3 = 89
"""Compute capability, times ten, from which Triton converts and multiplies e4m3."""
INT4_PERIOD = 128
"""Inputs of one period of split_128: 64 bytes hold the first half in their low nibbles."""
E4M3_UNIT = 2.0**8
"""What the bits of an e4m3 number stand for, over the float16 they make where its exponent and
mantissa lie: the exponents' biases are 7 and 15. It holds for subnormal numbers too."""


class Form(NamedTuple):
    """How weights are stored, as far as a kernel's body depends on it."""

    parts: int
    """Runs of inputs that a run of bytes holds: 2 for int4."""
    block_size: int
    unit: float
    """What `widen` leaves out."""


def grouped_matmul(
    x_TD: jax.Array | ScaledRows,
    weight: QTensor,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    gated: bool = False,
    target: Target,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Returns x[rows[r]] @ dequantized(weight)[group of r], [R, F]; zero past the last group.

    Differentiable in x alone.

    Args:
      x_TD: float [T, D]; or rows in fp8, which fp8 tensor cores multiply with weights in fp8: the
        result is bfloat16, and not differentiable.
      weight: of logical shape [E, D, F], or [E, D, 2 F] if gated: int8, int4 or fp8_e4m3.
      rows_R: int32 in [0, T), the row of x that each sorted row is; None: x is sorted, and R is T.
      gated: silu(gate) * up, where gate is the first half of the outputs.
    Raises:
      NotImplementedError: a format, order of nibbles or size of blocks that the kernel lacks.
    """
    reason = unsupported_reason(x_TD, weight, target)
    if reason is not None:
        raise NotImplementedError(reason)
    plan = Plan(target, tiles, gated)
    if isinstance(x_TD, ScaledRows):
        return _rows_times_outputs(plan, x_TD, weight, group_sizes_E, rows_R)
    return _grouped_matmul(plan, x_TD, weight, group_sizes_E, rows_R)


def unsupported_reason(x: jax.Array | ScaledRows, weight: QTensor, target: Target) -> str | None:
    """What keeps the kernel from multiplying, in a sentence; None: nothing."""
    readable_order = "split_128" if weight.format == "int4" else "canonical"
    # Bytes lie alike in both; only nibbles are split.
    if weight.packing == "panels" or (weight.bits == 4 and weight.packing != readable_order):
        return (
            f"the kernel reads {weight.format} in {readable_order} order and these weights are "
            f"{weight.packing}: kernels.quantize.repack(weight, '{readable_order}') once, as "
            "preferred_packing says"
        )
    least = INT4_PERIOD if weight.format == "int4" else 16
    if weight.block_size % least:
        return (
            f"the kernel needs blocks of a multiple of {least} inputs for {weight.format}, and "
            f"these weights have block_size={weight.block_size}: quantize them again"
        )
    if 2**31 < weight.values.size <= 2**32:
        return (
            f"Pallas counts these {weight.values.size} bytes in 32 bits, of which one is a sign: "
            "split them (over devices), or let them be more than 2**32"
        )
    return _reason_of_fp8_rows(weight, target) if isinstance(x, ScaledRows) else None


def _reason_of_fp8_rows(weight: QTensor, target: Target) -> str | None:
    if target.capability < OLDEST_E4M3:
        return f"rows in fp8 need a GPU of compute capability {OLDEST_E4M3 / 10}: pass bfloat16"
    if weight.format != "fp8_e4m3" or weight.block_size != BLOCK_SIZE:
        return (
            f"rows in fp8 are multiplied with fp8_e4m3 weights in blocks of {BLOCK_SIZE}, not with "
            f"{weight.format} in blocks of {weight.block_size}: pass bfloat16"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan, x_TD, weight, group_sizes_E, rows_R):
    return _rows_times_outputs(plan, x_TD, weight, group_sizes_E, rows_R)


def _forward(plan, x_TD, weight, group_sizes_E, rows_R):
    y_RF = _grouped_matmul(plan, x_TD, weight, group_sizes_E, rows_R)
    return y_RF, (x_TD, weight, group_sizes_E, rows_R)


def _backward(plan, residuals, dy_RF):
    x_TD, weight, group_sizes_E, rows_R = residuals
    if plan.gated:
        plain = plan._replace(gated=False)
        h_R2F = _rows_times_outputs(plain, x_TD, weight, group_sizes_E, rows_R)
        _, pull = jax.vjp(swiglu_of_halves, h_R2F)
        (dy_RF,) = pull(dy_RF)
    dx_RD = rows_times_inputs(plan, dy_RF, weight, group_sizes_E)
    return scatter_rows(dx_RD, rows_R, x_TD), None, None, None


_grouped_matmul.defvjp(_forward, _backward)


# --- Widening ------------------------------------------------------------------------------------


def readable(weight: QTensor, target: Target) -> tuple[jax.Array, Form]:
    """The stored values as the target's compiler can load them, and what they are.

    Triton has no e4m3 below compute capability 8.9: there, the kernel is given its bits.
    """
    form = Form(2 if weight.format == "int4" else 1, weight.block_size, 1.0)
    if weight.format != "fp8_e4m3" or target.capability >= OLDEST_E4M3:
        return weight.values, form
    return lax.bitcast_convert_type(weight.values, jnp.uint8), form._replace(unit=E4M3_UNIT)


def widen(codes: jax.Array, form: Form, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Stored values as numbers over form.unit, exactly; one array for each of form.parts."""
    if form.parts == 2:
        signed = codes.astype(jnp.int8)
        return ((signed << 4) >> 4).astype(dtype), (signed >> 4).astype(dtype)
    if form.unit == 1.0:
        return (codes.astype(dtype),)
    bits = codes.astype(jnp.uint16)
    half_bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (lax.bitcast_convert_type(half_bits, jnp.float16).astype(jnp.float32).astype(dtype),)


def fit_depth(tiles: Tiles, form: Form) -> Tiles:
    """The tiles with steps that lie within one block of inputs."""
    depth = INT4_PERIOD if form.parts == 2 else math.gcd(tiles.depth, form.block_size)
    return replace(tiles, depth=depth)


# --- The forward pass ----------------------------------------------------------------------------


def _rows_times_outputs(
    plan: Plan,
    x: jax.Array | ScaledRows,
    weight: QTensor,
    group_sizes_E: jax.Array,
    rows_R: jax.Array | None,
) -> jax.Array:
    x_TD, row_scales_TS = x if isinstance(x, ScaledRows) else (x, None)
    num_groups, d_in, d_out = weight.shape
    d_out //= 2 if plan.gated else 1
    num_rows = x_TD.shape[0] if rows_R is None else rows_R.shape[0]
    values_ENK, form = readable(weight, plan.target)
    tiles = plan.tiles or choose_quantized_tiles(
        num_rows // num_groups, d_out, target=plan.target, gated=plan.gated
    )
    tiles = fit_depth(tiles, form)
    suffix, out_dtype = "", x_TD.dtype
    if row_scales_TS is not None:
        tiles = replace(tiles, depth=BLOCK_SIZE)  # what tensor cores may sum imprecisely
        suffix, out_dtype = "_rows", jnp.bfloat16
    table = tile_table(group_sizes_E, num_rows, tiles, d_in * x_TD.dtype.itemsize)
    run = backend.triton_call(
        functools.partial(_outputs_kernel, tiles=tiles, form=form, gated=plan.gated),
        name=f"grouped_matmul_{weight.format}{suffix}",
        num_programs=len(table.group_P) * pl.cdiv(d_out, tiles.columns),
        out_shape=jax.ShapeDtypeStruct((num_rows, d_out), out_dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        target=plan.target,
    )
    return run(table, rows_R, x_TD, row_scales_TS, values_ENK, weight.scales)


def _outputs_kernel(
    table, rows_R, x_TD, row_scales_TS, values_ENK, scales_ESN, y_RF, *, tiles, form, gated
):
    (num_rows, d_out), d_in = y_RF.shape, x_TD.shape[1]
    num_groups, num_columns = values_ENK.shape[0], pl.cdiv(d_out, tiles.columns)
    group, first, end, column = place(pl.program_id(0), table, num_columns)
    start = column * tiles.columns

    @pl.when(group == num_groups)
    def _no_group():
        zeros_MN = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        write_rows(y_RF, zeros_MN, first, end, start)

    @pl.when(group < num_groups)
    def _multiply():
        rows_M = rows_of(tiles, first, num_rows, rows_R)
        is_output_N, part = edge(start, tiles.columns, d_out), tiles.depth // form.parts
        mask_NK = mask_of((tiles.columns, part), is_output_N)

        def step(k, sums):
            inputs = k * tiles.depth
            spans = [span(inputs + i * part, part) for i in range(form.parts)]
            x_parts = [read_rows(x_TD, rows_M, inputs_K) for inputs_K in spans]
            block, _ = divide(inputs, form.block_size)

            def add(half, sum_NM):
                outputs = pl.ds(start + half * d_out, tiles.columns)
                codes_NK = load(values_ENK.at[group, outputs, pl.ds(k * part, part)], mask_NK)
                scale_N = load(scales_ESN.at[group, block, outputs], is_output_N)
                scale_N1 = (scale_N.astype(jnp.float32) * form.unit)[:, None]
                if row_scales_TS is not None:
                    row_scale_1M = load(row_scales_TS.at[rows_M, block])[None]
                    from kernels.fp8_dot import dot_e4m3  # reaches into private modules of jax

                    product_NM = dot_e4m3(codes_NK, x_parts[0].T)
                    return sum_NM + scale_N1 * row_scale_1M * product_NM
                w_parts = widen(codes_NK, form, x_TD.dtype)
                products = [dot(w, x.T) for w, x in zip(w_parts, x_parts, strict=True)]
                return sum_NM + scale_N1 * sum(products[1:], products[0])

            return tuple(add(half, sum_NM) for half, sum_NM in enumerate(sums))

        zeros_NM = jnp.zeros((tiles.columns, tiles.rows), jnp.float32)
        sums = (zeros_NM,) * (2 if gated else 1)
        sums = lax.fori_loop(0, d_in // tiles.depth, step, sums)
        write_rows(y_RF, (swiglu(*sums) if gated else sums[0]).T, first, end, start)


# --- The gradient of x ---------------------------------------------------------------------------


def rows_times_inputs(
    plan: Plan, dy_RF: jax.Array, weight: QTensor, group_sizes_E: jax.Array
) -> jax.Array:
    """dy[r] @ dequantized(weight)[group of r]^T, [R, D]."""
    num_groups, d_in, d_out = weight.shape
    num_rows = dy_RF.shape[0]
    values_ENK, form = readable(weight, plan.target)
    tiles = plan.tiles or choose_quantized_tiles(
        num_rows // num_groups, d_in, target=plan.target, gated=False
    )
    tiles = _fit_columns(tiles, form)
    table = tile_table(group_sizes_E, num_rows, tiles, d_out * dy_RF.dtype.itemsize)
    run = backend.triton_call(
        functools.partial(_inputs_kernel, tiles=tiles, form=form),
        name=f"grouped_matmul_dx_{weight.format}",
        num_programs=len(table.group_P) * (d_in // tiles.columns),
        out_shape=jax.ShapeDtypeStruct((num_rows, d_in), dy_RF.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        target=plan.target,
    )
    return run(table, dy_RF, values_ENK, weight.scales)


def _fit_columns(tiles: Tiles, form: Form) -> Tiles:
    """The tiles with columns, inputs here, that lie within one block; steps over outputs of 64."""
    columns = INT4_PERIOD if form.parts == 2 else math.gcd(tiles.columns, form.block_size)
    return replace(tiles, columns=columns, depth=min(tiles.depth, 64))


def _inputs_kernel(table, dy_RF, values_ENK, scales_ESN, dx_RD, *, tiles, form):
    """The scale, of an output and a block of inputs, multiplies dy: a tile has one such block."""
    (num_rows, d_in), d_out = dx_RD.shape, dy_RF.shape[1]
    num_groups, part = values_ENK.shape[0], tiles.columns // form.parts
    group, first, end, column = place(pl.program_id(0), table, d_in // tiles.columns)
    start = column * tiles.columns
    zeros = (jnp.zeros((tiles.rows, part), jnp.float32),) * form.parts

    def write(parts):
        for i, dx_MN in enumerate(parts):
            write_rows(dx_RD, dx_MN, first, end, start + i * part)

    @pl.when(group == num_groups)
    def _no_group():
        write(zeros)

    @pl.when(group < num_groups)
    def _multiply():
        rows_M = rows_of(tiles, first, num_rows)
        block, _ = divide(start, form.block_size)

        def step(k, sums):
            outputs = pl.ds(k * tiles.depth, tiles.depth)
            is_output_K = edge(k * tiles.depth, tiles.depth, d_out)
            scale_K = load(scales_ESN.at[group, block, outputs], is_output_K)
            scale_K = scale_K.astype(jnp.float32) * form.unit
            outputs_K = span(k * tiles.depth, tiles.depth)
            dy_MK = read_rows(dy_RF, rows_M, outputs_K, is_output_K)
            dy_MK = (dy_MK.astype(jnp.float32) * scale_K[None]).astype(dy_RF.dtype)
            codes = values_ENK.at[group, outputs, pl.ds(column * part, part)]
            codes_KN = load(codes, mask_of((tiles.depth, part), is_output_K))
            w_parts = widen(codes_KN, form, dy_RF.dtype)
            return tuple(a + dot(dy_MK, w_KN) for a, w_KN in zip(sums, w_parts, strict=True))

        write(lax.fori_loop(0, pl.cdiv(d_out, tiles.depth), step, zeros))
