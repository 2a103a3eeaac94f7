"""grouped_matmul in bfloat16 as a Mosaic kernel, for Hopper alone.

Each core loops over pairs of a tile of rows and a block of columns, in the order of the Triton
kernel (tiles.py). One of its warpgroups copies blocks of x and of the matrices to shared memory,
some steps ahead (TMA); two multiply them, each half of the rows with all the columns, in sums that
stay in registers. While one of them writes its results the other one goes on multiplying, as far
as the copies are ahead.

What is read for a tile begins at a multiple of 8 rows, and may end beyond the tile's group or the
array. Where a warpgroup's rows are all the tile's own, they are copied out from swizzled memory.
Of others only the tile's own rows are, in pieces whose sizes are powers of two, as a copy's size is
part of the program.

T rows of x, R rows sorted by group, E groups (experts), D input width, F output width; a warpgroup
has M rows of a tile, multiplies K of the contraction at a time with N columns, and writes C of them
at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import backend
from kernels.backend import Target
from kernels.grouped_matmul import pallas_triton
from kernels.grouped_matmul.pallas_triton import Plan, scatter_rows
from kernels.grouped_matmul.tiles import Place, Tiles, TileTable, place, tile_table
from kernels.warpgroups import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    SWIZZLED_ROWS,
    Ring,
    barriers,
    fill,
    give_back,
    pad_rows,
    sum_of_products,
    swizzled,
    wait_filled,
    wait_free,
)

COMPUTE_WARPGROUPS = 2
WIDTH = 64
"""Of bfloat16 in the longest row that shared memory swizzles: widths are multiples of it."""
WRITE_SLOTS = 2
"""Parts of a warpgroup's results that are on their way to memory."""


def grouped_matmul(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    target: Target,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Returns y[r] = x[rows[r]] @ w[group of r], [R, F], and zero for rows past the last group.

    Differentiable in x, by this kernel, and in w, by the Triton kernel.

    Args:
      x_TD, w_EDF: bfloat16; D and F multiples of 64.
      rows_R: int32 in [0, T), the row of x that each sorted row is, which makes a sorted copy of x;
        None: x is sorted, and R is T.
      tiles: of rows times matrices; None: chosen by the shapes.
    Raises:
      NotImplementedError: another dtype or width.
    """
    reason = unsupported_reason(x_TD, w_EDF, target)
    if reason is not None:
        raise NotImplementedError(reason)
    return _grouped_matmul(Plan(target, tiles), x_TD, w_EDF, group_sizes_E, rows_R)


def unsupported_reason(x: jax.Array, w_EDF: jax.Array, target: Target) -> str | None:
    """What keeps the kernel from multiplying, in a sentence; None: nothing."""
    if target.platform == "interpret":
        return None
    if x.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"the Mosaic kernel multiplies bfloat16, x is {x.dtype}: cast it, or take 'triton'"
    d_in, d_out = w_EDF.shape[1:]
    if d_in % WIDTH or d_out % WIDTH:
        return (
            f"the Mosaic kernel needs matrices whose sides are multiples of {WIDTH}, and these are "
            f"{d_in} x {d_out}: take 'triton'"
        )
    return None


def choose_tiles(d_out: int, *, target: Target) -> Tiles:
    """Returns tiles for results d_out wide; with as many steps ahead as shared memory allows."""
    if target.platform == "interpret":
        return Tiles(rows=16, columns=32, depth=16, num_warps=12, num_stages=3)
    columns = 256 if d_out > 128 else 128
    return Tiles(rows=128, columns=columns, depth=WIDTH, num_warps=12, num_stages=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan, x_TD, w_EDF, group_sizes_E, rows_R):
    x_RD = x_TD if rows_R is None else x_TD[rows_R]
    return _rows_times_matrix(plan, x_RD, w_EDF, group_sizes_E)


def _forward(plan, x_TD, w_EDF, group_sizes_E, rows_R):
    y_RF = _grouped_matmul(plan, x_TD, w_EDF, group_sizes_E, rows_R)
    return y_RF, (x_TD, w_EDF, group_sizes_E, rows_R)


def _backward(plan, residuals, dy_RF):
    x_TD, w_EDF, group_sizes_E, rows_R = residuals
    dx_RD = _rows_times_matrix(plan, dy_RF, w_EDF, group_sizes_E, transpose=True)
    x_RD = x_TD if rows_R is None else x_TD[rows_R]
    dw_EDF = pallas_triton._rows_times_rows(plan, x_RD, dy_RF, group_sizes_E)
    return scatter_rows(dx_RD, rows_R, x_TD), dw_EDF.astype(w_EDF.dtype), None, None


_grouped_matmul.defvjp(_forward, _backward)


class Call(NamedTuple):
    """What the kernel's body knows besides its refs."""

    tiles: Tiles
    transpose: bool
    target: Target

    @property
    def rows(self) -> int:
        """Of a warpgroup."""
        return self.tiles.rows // COMPUTE_WARPGROUPS

    @property
    def width(self) -> int:
        """Columns that are written at a time."""
        return 8 if self.target.platform == "interpret" else WIDTH


def _rows_times_matrix(
    plan: Plan,
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    transpose: bool = False,
) -> jax.Array:
    """x[r] @ w[group of r], [R, F]; transpose: with its transpose."""
    num_rows, d_in = x_RD.shape
    d_out = w_EDF.shape[1 if transpose else 2]
    tiles = plan.tiles or choose_tiles(d_out, target=plan.target)
    row_bytes = d_in * x_RD.dtype.itemsize
    table = tile_table(group_sizes_E, num_rows, tiles, row_bytes, alignment=SWIZZLED_ROWS)
    call = Call(tiles, transpose, plan.target)
    run = backend.mosaic_call(
        functools.partial(_kernel, call),
        name="mosaic_grouped_matmul_dx" if transpose else "mosaic_grouped_matmul",
        out_type=jax.ShapeDtypeStruct((num_rows, d_out), x_RD.dtype),
        num_warpgroups=tiles.num_warps // 4,
        scratch={"scratch": _scratch(call, x_RD.dtype)},
        target=plan.target,
    )
    return run(*table, pad_rows(x_RD, 0, tiles.rows, plan.target), w_EDF)


class Scratch(NamedTuple):
    """Shared memory: L slots of steps, W computing warpgroups, P parts of their results."""

    x_LWMK: Any
    w_L: Any
    """[L, K, N], or [L, N, K] where the matrices are transposed."""
    ring: Ring
    y: Any
    """Two refs of [W, P, M, C] which share their memory on a GPU: swizzled, and not."""


def _scratch(call: Call, dtype: Any) -> Scratch:
    tiles, bits = call.tiles, 8 * jnp.dtype(dtype).itemsize
    slots, depth = tiles.num_stages, tiles.depth
    w = (tiles.columns, depth) if call.transpose else (depth, tiles.columns)
    results = (COMPUTE_WARPGROUPS, WRITE_SLOTS, call.rows, call.width)
    y = (
        plgpu.SMEM(results, dtype, transforms=swizzled(call.width, bits)),
        plgpu.SMEM(results, dtype),
    )
    return Scratch(
        plgpu.SMEM(
            (slots, COMPUTE_WARPGROUPS, call.rows, depth), dtype, transforms=swizzled(depth, bits)
        ),
        plgpu.SMEM((slots, *w), dtype, transforms=swizzled(w[1], bits)),
        barriers(slots, COMPUTE_WARPGROUPS + 1, COMPUTE_WARPGROUPS),
        y if call.target.platform == "interpret" else plgpu.RefUnion(*y),
    )


def _kernel(call: Call, *refs, scratch: Scratch):
    *table, x_RD, w_EDF, y_RF = refs
    table = TileTable(*table)
    num_columns = pl.cdiv(y_RF.shape[1], call.tiles.columns)
    num_programs = table.group_P.shape[0] * num_columns
    # Asked for here first: the interpreter keeps them.
    warpgroup, core = lax.axis_index("warpgroup"), lax.axis_index("core")

    def place_of(program) -> Place:
        return place(jnp.minimum(program, num_programs - 1), table, num_columns)

    def over_tiles(run) -> Any:
        """Calls run(place, step, steps of the place, next) for each of this core's places.

        What it returns is that of next(), the next place: a chain of reads to begin early. Returns
        all steps.
        """

        def each(loop, carry):
            step, at = carry
            has_work = (at.first_row < at.end_row) & (at.group < w_EDF.shape[0])
            num_steps = jnp.where(has_work, x_RD.shape[1] // call.tiles.depth, 0)
            next_program = loop.index[0] + lax.axis_size("core")
            return step + num_steps, run(at, step, num_steps, lambda: place_of(next_program))

        first = (jnp.int32(0), place_of(core))
        return plgpu.nd_loop((num_programs,), collective_axes="core", init_carry=first)(each)[0]

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy = functools.partial(_copy_tile, call, scratch, x_RD, w_EDF)
        wait_free(scratch.ring, over_tiles(copy))

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        over_tiles(functools.partial(_multiply_tile, call, scratch, y_RF, warpgroup))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_tile(
    call: Call, scratch: Scratch, x_RD, w_EDF, at: Place, step, num_steps, next_place
) -> Place:
    columns = pl.ds(at.column * call.tiles.columns, call.tiles.columns)

    def copy(k, _):
        inputs = pl.ds(k * call.tiles.depth, call.tiles.depth)
        block = (columns, inputs) if call.transpose else (inputs, columns)
        copies = [(w_EDF.at[at.group, *block], scratch.w_L)]
        for warpgroup in range(COMPUTE_WARPGROUPS):
            rows = pl.ds(_first_row_read(call, at, warpgroup), call.rows)
            copies.append((x_RD.at[rows, inputs], scratch.x_LWMK.at[:, warpgroup]))
        fill(scratch.ring, step + k, copies)

    lax.fori_loop(0, num_steps, copy, None)
    return next_place()


def _first_row_read(call: Call, at: Place, warpgroup: Any) -> jax.Array:
    """By a warpgroup, for the tile: it begins where copies to and from swizzled memory can."""
    before = lax.rem(at.first_row, jnp.int32(SWIZZLED_ROWS))
    return at.first_row - before + warpgroup * call.rows


def _multiply_tile(
    call: Call, scratch: Scratch, y_RF, warpgroup, at: Place, step, num_steps, next_place
) -> Place:
    """Multiplies and writes; without steps, zeros: the rows that no group owns."""

    def operands(k):
        slot = wait_filled(scratch.ring, step + k)
        return scratch.x_LWMK.at[slot, warpgroup], scratch.w_L.at[slot]

    def release(k):
        give_back(scratch.ring, scratch.ring.slot(step + k), threads_read=False)

    y_MN, next_at = sum_of_products(
        num_steps,
        operands,
        release,
        (call.rows, call.tiles.columns),
        call.target,
        transpose=call.transpose,
        meanwhile=next_place,
    )
    _write(call, scratch, at, warpgroup, y_MN.astype(y_RF.dtype), y_RF)
    return next_at


def _write(call: Call, scratch: Scratch, at: Place, warpgroup, y_MN, y_RF) -> None:
    """Copies the tile's own rows of this warpgroup's to the result, some columns at a time."""
    swizzled_WPMC, plain_WPMC = scratch.y
    first_read = _first_row_read(call, at, warpgroup)
    first = jnp.maximum(at.first_row, first_read)
    count = jnp.maximum(jnp.minimum(at.end_row, first_read + call.rows) - first, 0)
    # A GPU reaches only whole groups of rows of an array from swizzled memory.
    can_be_whole = y_RF.shape[0] % SWIZZLED_ROWS == 0
    is_whole = (count == call.rows) & can_be_whole

    def write_parts(y_WPMC, copy, num_waiting):
        """Calls copy(ref, columns) for each part of the columns, once it lies in the ref."""
        for part in range(call.tiles.columns // call.width):
            y_MC = y_WPMC.at[warpgroup, part % WRITE_SLOTS]
            start = at.column * call.tiles.columns + part * call.width

            @pl.when(start < y_RF.shape[1])
            def _part(part=part, y_MC=y_MC, start=start):
                plgpu.wait_smem_to_gmem(num_waiting if part else 0, wait_read_only=True)
                y_MC[...] = y_MN[:, part * call.width : (part + 1) * call.width]
                plgpu.commit_smem()
                copy(y_MC, pl.ds(start, call.width))

    def copy_whole(y_MC, columns):
        plgpu.copy_smem_to_gmem(y_MC, y_RF.at[pl.ds(first, call.rows), columns])

    def copy_pieces(y_MC, columns):
        for bit in range(call.rows.bit_length() - can_be_whole):
            size = 1 << bit
            before = (count >> (bit + 1)) << (bit + 1)  # rows of the larger pieces

            @pl.when(count & size != 0)
            def _copy(size=size, before=before):
                plgpu.copy_smem_to_gmem(
                    y_MC.at[pl.ds(first - first_read + before, size)],
                    y_RF.at[pl.ds(first + before, size), columns],
                )

    if can_be_whole:
        pl.when(is_whole)(lambda: write_parts(swizzled_WPMC, copy_whole, WRITE_SLOTS - 1))

    @pl.when((count > 0) & ~is_whole)
    def _pieces():
        write_parts(plain_WPMC, copy_pieces, 0)
