"""grouped_matmul with weights of few bits as a Mosaic kernel, for Hopper alone.

Each core loops over pairs of a tile of rows and a block of columns, in the order of the Triton
kernel (tiles.py). One of its warpgroups copies blocks of x, of the weights as they are stored, and
of their scales to shared memory, some steps ahead (TMA); two multiply them, each half of the
columns. The weights are the left operand, widened in registers, and the rows of x are the columns
of a product: a tile may have as few as 16 of them. A scale multiplies the float32 sum over a step,
never a weight.

What is read for a tile begins at a multiple of 8 rows, and may end beyond the tile's group or the
array. Of the result only the tile's own rows are copied out, in pieces whose sizes are powers of
two, as a copy's size is part of the program.

int4 is read in the canonical order, which is that of XLA's own int4: nothing is repacked.

T rows of x, R rows sorted by group, E groups (experts), D input width, F output width, S blocks of
inputs; a tile is M rows, K of the contraction at a time, and N columns of one warpgroup.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import backend
from kernels.backend import Target
from kernels.grouped_matmul import pallas_triton_quantized
from kernels.grouped_matmul.pallas_triton import Plan, scatter_rows, swiglu, swiglu_of_halves
from kernels.grouped_matmul.tiles import Place, Tiles, TileTable, place, tile_table
from kernels.quantize import QTensor, repack
from kernels.warpgroups import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    OF_ROW,
    PACKED,
    SUMS,
    SWIZZLED_ROWS,
    Ring,
    barriers,
    fill,
    give_back,
    pad_rows,
    product,
    read,
    spread,
    swizzled,
    wait_filled,
    wait_free,
    write_transposed,
)

DEPTH = 128
"""Inputs of a step: 128 bytes of int8, the longest row that shared memory swizzles."""
COMPUTE_WARPGROUPS = 2
COLUMNS_OF_WARPGROUP = 64
"""Rows of one wgmma, as weights are the left operand."""


def grouped_matmul(
    x_TD: jax.Array,
    weight: QTensor,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    gated: bool = False,
    target: Target,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Returns x[rows[r]] @ dequantized(weight)[group of r], [R, F]; zero past the last group.

    Differentiable in x alone, by the Triton kernel; for that, int4 is repacked in memory.

    Args:
      x_TD: bfloat16 [T, D].
      weight: of logical shape [E, D, F], or [E, D, 2 F] if gated: int8, int4 or fp8_e4m3.
      rows_R: int32 in [0, T), the row of x that each sorted row is, which makes a sorted copy of x;
        None: x is sorted, and R is T.
      gated: silu(gate) * up, where gate is the first half of the outputs.
    Raises:
      NotImplementedError: rows, a format, order of nibbles or size that the kernel lacks.
    """
    reason = unsupported_reason(x_TD, weight, gated=gated, target=target)
    if reason is not None:
        raise NotImplementedError(reason)
    return _grouped_matmul(Plan(target, tiles, gated), x_TD, weight, group_sizes_E, rows_R)


def unsupported_reason(
    x_TD: Any, weight: QTensor, *, gated: bool = False, target: Target
) -> str | None:
    """What keeps the kernel from multiplying, in a sentence; None: nothing."""
    if weight.packing != "canonical":
        return (
            f"the Mosaic kernel reads weights in canonical order and these are {weight.packing}: "
            "kernels.quantize.repack(weight, 'canonical') once, as preferred_packing says"
        )
    if weight.block_size % DEPTH:
        return (
            f"the Mosaic kernel needs blocks of a multiple of {DEPTH} inputs, and these weights "
            f"have block_size={weight.block_size}: quantize them again"
        )
    num_outputs = weight.shape[-1] // (2 if gated else 1)
    if num_outputs % COLUMNS_OF_WARPGROUP and target.platform != "interpret":
        return (
            f"the Mosaic kernel writes {COLUMNS_OF_WARPGROUP} outputs at a time, and these weights "
            f"have {num_outputs}: take 'triton'"
        )
    if getattr(x_TD, "dtype", None) != jnp.bfloat16 and target.platform != "interpret":
        return "the Mosaic kernel multiplies rows in bfloat16: cast x, or take 'triton'"
    return None


def choose_tiles(mean_rows: int, *, gated: bool, target: Target) -> Tiles:
    """Returns tiles for a group of mean_rows rows, none of which spills (kernels/compiled.json).

    Steps ahead as shared memory allows.
    """
    columns = COMPUTE_WARPGROUPS * (8 if target.platform == "interpret" else COLUMNS_OF_WARPGROUP)
    num_warps = 4 * COMPUTE_WARPGROUPS + 4
    tile = functools.partial(Tiles, columns=columns, depth=DEPTH, num_warps=num_warps)
    if target.platform == "interpret":
        return tile(rows=16, num_stages=2)
    if mean_rows <= 16:
        return tile(rows=16, num_stages=5 if gated else 8)
    if mean_rows <= 32:
        return tile(rows=32, num_stages=5 if gated else 8)
    if mean_rows <= 128 or gated:
        return tile(rows=64, num_stages=4 if gated else 6)
    return tile(rows=128, num_stages=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan, x_TD, weight, group_sizes_E, rows_R):
    x_RD = x_TD if rows_R is None else x_TD[rows_R]
    return _rows_times_outputs(plan, x_RD, weight, group_sizes_E)


def _forward(plan, x_TD, weight, group_sizes_E, rows_R):
    y_RF = _grouped_matmul(plan, x_TD, weight, group_sizes_E, rows_R)
    return y_RF, (x_TD, weight, group_sizes_E, rows_R)


def _backward(plan, residuals, dy_RF):
    x_TD, weight, group_sizes_E, rows_R = residuals
    if plan.gated:
        x_RD = x_TD if rows_R is None else x_TD[rows_R]
        plain = plan._replace(gated=False)
        h_R2F = _rows_times_outputs(plain, x_RD, weight, group_sizes_E)
        _, pull = jax.vjp(swiglu_of_halves, h_R2F)
        (dy_RF,) = pull(dy_RF)
    dx_RD = pallas_triton_quantized.rows_times_inputs(
        Plan(plan.target, None), dy_RF, repack(weight, "split_128"), group_sizes_E
    )
    return scatter_rows(dx_RD, rows_R, x_TD), None, None, None


_grouped_matmul.defvjp(_forward, _backward)


def readable(weight: QTensor) -> jax.Array:
    """The stored values [E, N, K] in a type that has one element for each."""
    if weight.format != "int4":
        return weight.values
    num_groups, num_outputs, num_bytes = weight.values.shape
    pairs = lax.bitcast_convert_type(weight.values, jnp.int4)  # the low nibble first
    return pairs.reshape(num_groups, num_outputs, 2 * num_bytes)


class Call(NamedTuple):
    """What the kernel's body knows besides its refs."""

    tiles: Tiles
    bits: int
    block_size: int
    d_out: int
    gated: bool
    target: Target


def _rows_times_outputs(
    plan: Plan, x_RD: jax.Array, weight: QTensor, group_sizes_E: jax.Array
) -> jax.Array:
    num_groups, d_in, d_out = weight.shape
    d_out //= 2 if plan.gated else 1
    num_rows = x_RD.shape[0]
    tiles = plan.tiles or choose_tiles(num_rows // num_groups, gated=plan.gated, target=plan.target)
    row_bytes = d_in * x_RD.dtype.itemsize
    table = tile_table(group_sizes_E, num_rows, tiles, row_bytes, alignment=SWIZZLED_ROWS)
    call = Call(tiles, weight.bits, weight.block_size, d_out, plan.gated, plan.target)
    values_ENK = readable(weight)
    run = backend.mosaic_call(
        functools.partial(_outputs_kernel, call),
        name=f"mosaic_grouped_matmul_{weight.format}",
        out_type=jax.ShapeDtypeStruct((num_rows, d_out), x_RD.dtype),
        num_warpgroups=tiles.num_warps // 4,
        scratch={"scratch": _scratch(call, x_RD.dtype, values_ENK.dtype, weight.scales.dtype)},
        target=plan.target,
    )
    x_RD = pad_rows(x_RD, 0, tiles.rows, plan.target)
    return run(*table, x_RD, values_ENK, weight.scales)


class Scratch(NamedTuple):
    """Shared memory: L slots, H halves of the outputs (2 if gated), W computing warpgroups."""

    x_LMK: Any
    values_HLNK: tuple[Any, ...]
    scales_HLN: tuple[Any, ...]
    ring: Ring
    y_WMN: Any


def _scratch(call: Call, x_dtype: Any, values_dtype: Any, scales_dtype: Any) -> Scratch:
    tiles, halves, slots = call.tiles, 2 if call.gated else 1, call.tiles.num_stages
    x = plgpu.SMEM(
        (slots, tiles.rows, tiles.depth),
        x_dtype,
        transforms=swizzled(tiles.depth, 8 * jnp.dtype(x_dtype).itemsize),
    )
    values = plgpu.SMEM(
        (slots, tiles.columns, tiles.depth),
        values_dtype,
        transforms=swizzled(tiles.depth, call.bits),
    )
    scales = plgpu.SMEM((slots, tiles.columns), scales_dtype)
    part = tiles.columns // COMPUTE_WARPGROUPS
    return Scratch(
        x,
        (values,) * halves,
        (scales,) * halves,
        barriers(slots, 1 + 2 * halves, COMPUTE_WARPGROUPS),
        plgpu.SMEM((COMPUTE_WARPGROUPS, tiles.rows, part), x_dtype),
    )


def _outputs_kernel(call: Call, *refs, scratch: Scratch):
    *table, x_RD, values_ENK, scales_ESN, y_RF = refs
    table = TileTable(*table)
    num_columns = pl.cdiv(call.d_out, call.tiles.columns)
    num_programs = table.group_P.shape[0] * num_columns
    warpgroup = lax.axis_index("warpgroup")  # asked for here first: the interpreter keeps it

    def over_tiles(run) -> Any:
        """Calls run(place, step, steps of the place) for each of this core's; returns all steps."""

        def each(loop, carry):
            at = place(loop.index[0], table, num_columns)
            has_work = (at.first_row < at.end_row) & (at.group < values_ENK.shape[0])
            num_steps = jnp.where(has_work, x_RD.shape[1] // call.tiles.depth, 0)
            run(at, carry, num_steps)
            return carry + num_steps

        return plgpu.nd_loop((num_programs,), collective_axes="core", init_carry=jnp.int32(0))(each)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        refs = (x_RD, values_ENK, scales_ESN)
        wait_free(scratch.ring, over_tiles(functools.partial(_copy_tile, call, scratch, *refs)))

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        over_tiles(functools.partial(_multiply_tile, call, scratch, y_RF, warpgroup))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_tile(
    call: Call, scratch: Scratch, x_RD, values_ENK, scales_ESN, at: Place, step, num_steps
) -> None:
    tiles = call.tiles
    rows = pl.ds(at.first_row - _rows_before(at), tiles.rows)
    start = at.column * tiles.columns

    def copy(k, _):
        inputs = pl.ds(k * tiles.depth, tiles.depth)
        block = lax.div(k * tiles.depth, jnp.int32(call.block_size))
        copies = [(x_RD.at[rows, inputs], scratch.x_LMK)]
        for half, (values_LNK, scales_LN) in enumerate(
            zip(scratch.values_HLNK, scratch.scales_HLN, strict=True)
        ):
            outputs = pl.ds(start + half * call.d_out, tiles.columns)
            copies.append((values_ENK.at[at.group, outputs, inputs], values_LNK))
            copies.append((scales_ESN.at[at.group, block, outputs], scales_LN))
        fill(scratch.ring, step + k, copies)

    lax.fori_loop(0, num_steps, copy, None)


def _multiply_tile(
    call: Call, scratch: Scratch, y_RF, warpgroup, at: Place, step, num_steps
) -> None:
    """Multiplies and writes; without steps, zeros: the rows that no group owns."""
    part = call.tiles.columns // COMPUTE_WARPGROUPS
    row = warpgroup * part

    def multiply(k, sums):
        slot = wait_filled(scratch.ring, step + k)
        x_MK = scratch.x_LMK.at[slot]

        def add(sum_NM, values_LNK, scales_LN):
            codes_NK = read(
                values_LNK.at[slot], PACKED[call.bits], call.target, start=row, rows=part
            )
            w_NK = widen(codes_NK, x_MK.dtype, call.target)
            scale_N = read(scales_LN.at[slot], OF_ROW, call.target, start=row, rows=part)
            product_NM = product(w_NK, x_MK, call.target)
            scale_NM = lax.broadcast_in_dim(scale_N.astype(jnp.float32), sum_NM.shape, [0])
            return sum_NM + scale_NM * product_NM

        sums = tuple(map(add, sums, scratch.values_HLNK, scratch.scales_HLN))
        give_back(scratch.ring, slot)
        return sums

    zeros_NM = spread(jnp.zeros((part, call.tiles.rows), jnp.float32), SUMS, call.target)
    sums = (zeros_NM,) * len(scratch.values_HLNK)
    sums = lax.fori_loop(0, num_steps, multiply, sums)
    y_NM = swiglu(*sums) if call.gated else sums[0]
    _write_tile(call, at, warpgroup, y_NM, y_RF, scratch.y_WMN)


def _rows_before(at: Place) -> jax.Array:
    """Of what is read for the tile: it begins where copies to swizzled memory can."""
    return lax.rem(at.first_row, jnp.int32(SWIZZLED_ROWS))


def widen(codes_NK: jax.Array, dtype: jnp.dtype, target: Target) -> jax.Array:
    """Stored values as numbers, exactly, spread as a left operand."""
    codes_NK = spread(codes_NK, SUMS, target)  # while they are small: threads exchange them
    if codes_NK.dtype == jnp.float8_e4m3fn:
        codes_NK = codes_NK.astype(jnp.float32)  # there is no conversion to bfloat16
    return codes_NK.astype(dtype)


def _write_tile(
    call: Call, at: Place, warpgroup: jax.Array, y_NM: jax.Array, y_RF: Any, y_WMN: Any
) -> None:
    """Copies the tile's own rows, of this warpgroup's columns, to the result."""
    y_MN = y_WMN.at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    write_transposed(y_MN, y_NM.astype(y_RF.dtype), call.target)
    plgpu.commit_smem()
    part = y_MN.shape[1]
    start = at.column * call.tiles.columns + warpgroup * part
    # A copy of one row is not clipped where the array ends, so none begins beyond.
    count = jnp.where(start < call.d_out, at.end_row - at.first_row, 0)
    for bit in range(int(math.log2(call.tiles.rows)) + 1):
        size = 1 << bit
        before = (count >> (bit + 1)) << (bit + 1)  # rows of the larger pieces

        @pl.when(count & size != 0)
        def _copy(size=size, before=before):
            plgpu.copy_smem_to_gmem(
                y_MN.at[pl.ds(_rows_before(at) + before, size)],
                y_RF.at[pl.ds(at.first_row + before, size), pl.ds(start, part)],
            )
