"""The forward pass of window_attention as a Mosaic kernel, for Hopper alone.

Each core loops over blocks of queries of one head, in the order of the Triton kernel. One of its
warpgroups copies the queries, and then the blocks of keys and values that any of them sees, to
shared memory, some blocks ahead (TMA); two others attend, each for half of the queries. Scores and
what comes of them stay in registers: the weights of a block are the left operand of their product
with its values. What is seen is decided as in the Triton kernel, and so are the logarithms of the
softmax's sums: its backward pass serves this one too.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values; a warpgroup has a
block of M queries, and N keys at a time.
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
from kernels.backend import Target, divide
from kernels.warpgroups import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    OF_COLUMN,
    OF_ROW,
    SUMS,
    Ring,
    add_product,
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
)
from kernels.window_attention import pallas_triton
from kernels.window_attention.pallas_triton import LOG2_E, Reach, Steps, key_blocks
from kernels.window_attention.reference import MASKED, visible

COMPUTE_WARPGROUPS = 2
WIDTHS = (64, 128)
"""Of heads, whose rows fill what shared memory swizzles, and registers hold with their sums."""


class Blocks(NamedTuple):
    """Rows of a warpgroup's block, and how many blocks of keys are copied ahead."""

    queries: int
    keys: int
    num_slots: int
    shares: bool = False
    """Whether results lie where their queries lay, which leaves room for another slot."""
    takes_turns: bool = True
    """Whether one warpgroup multiplies while the other does its softmax (FlashAttention-3, 2024,
    section 3.1)."""


HOPPER = Blocks(64, 128, 2)
INTERPRETED = Blocks(16, 16, 2)


def window_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None = None,
    target: Target,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Returns the attention of each row over the visible rows of its segment, [B, L, H, W].

    Differentiable in q, k, v and sink_logits, by the Triton kernels. A row that sees nothing gets
    zeros.

    Raises:
      NotImplementedError: heads that are not 64 or 128 wide, or not in bfloat16.
    """
    reason = unsupported_reason(q_BLHC, v_BLGW, target)
    if reason is not None:
        raise NotImplementedError(reason)
    rows = pallas_triton.rows_of(positions_BL, segments_BL)
    if blocks is None:
        blocks = INTERPRETED if target.platform == "interpret" else HOPPER
    reach = Reach(window_size, num_sink_tokens, target)
    return _attention(reach, blocks, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows)


def unsupported_reason(q_BLHC: jax.Array, v_BLGW: jax.Array, target: Target) -> str | None:
    """What keeps the kernel from attending, in a sentence; None: nothing."""
    if target.platform == "interpret":
        return None
    widths = (q_BLHC.shape[3], v_BLGW.shape[3])
    if not set(widths) <= set(WIDTHS):
        return (
            f"the Mosaic kernel has heads of {' or '.join(map(str, WIDTHS))} channels, and here "
            f"keys have {widths[0]} and values {widths[1]}: take 'triton'"
        )
    if q_BLHC.dtype != jnp.bfloat16:
        return f"the Mosaic kernel attends in bfloat16, q is {q_BLHC.dtype}: take 'triton'"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(reach, blocks, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows):
    return _run(reach, blocks, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows)[0]


def _forward(reach, blocks, *operands):
    out_BLHW, log_sum_BHL = _run(reach, blocks, *operands)
    return out_BLHW, (*operands, out_BLHW, log_sum_BHL)


def _backward(reach, _, residuals, dout_BLHW):
    return pallas_triton.backward(reach, residuals, dout_BLHW)


_attention.defvjp(_forward, _backward)


class Scratch(NamedTuple):
    """Shared memory: A computing warpgroups, S slots of keys; one block of queries at a time."""

    q_1AMC: Any
    q_positions_1AM: Any
    q_segments_1AM: Any
    queries: Ring
    k_SNC: Any
    v_SNW: Any
    k_positions_SN: Any
    k_segments_SN: Any
    keys: Ring
    out_AMW: Any
    """None: in the place of the queries."""
    log_sum_AM: Any
    turns: Any
    """A barrier at which a warpgroup lets the other multiply; None: they take no turns."""

    def pass_turn(self) -> None:
        if self.turns is not None:
            plgpu.barrier_arrive(self.turns)
            plgpu.barrier_wait(self.turns)


def _scratch(blocks: Blocks, head_dim: int, value_dim: int, dtype: Any) -> Scratch:
    warpgroups, bits = COMPUTE_WARPGROUPS, 8 * jnp.dtype(dtype).itemsize
    queries, keys = (1, warpgroups, blocks.queries), (blocks.num_slots, blocks.keys)
    of_keys, of_values = swizzled(head_dim, bits), swizzled(value_dim, bits)
    return Scratch(
        q_1AMC=plgpu.SMEM((*queries, head_dim), dtype, transforms=of_keys),
        q_positions_1AM=plgpu.SMEM(queries, jnp.int32),
        q_segments_1AM=plgpu.SMEM(queries, jnp.int32),
        queries=barriers(1, 3 * warpgroups, warpgroups),
        k_SNC=plgpu.SMEM((*keys, head_dim), dtype, transforms=of_keys),
        v_SNW=plgpu.SMEM((*keys, value_dim), dtype, transforms=of_values),
        k_positions_SN=plgpu.SMEM(keys, jnp.int32),
        k_segments_SN=plgpu.SMEM(keys, jnp.int32),
        keys=barriers(blocks.num_slots, 4, warpgroups),
        out_AMW=None
        if blocks.shares
        else plgpu.SMEM((*queries[1:], value_dim), dtype, transforms=of_values),
        log_sum_AM=plgpu.SMEM(queries[1:], jnp.float32),
        turns=plgpu.Barrier(num_arrivals=warpgroups) if blocks.takes_turns else None,
    )


def _run(reach, blocks, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows):
    """Returns (out [B, L, H, W], base-2 log of each row's sum of exponentials [B, H, L padded])."""
    batch, length, heads, head_dim = q_BLHC.shape
    value_dim, dtype = v_BLGW.shape[3], q_BLHC.dtype
    q_BLHC, k_BLGC, v_BLGW = (
        pad_rows(x, 1, blocks.queries, reach.target) for x in (q_BLHC, k_BLGC, v_BLGW)
    )
    sinks = () if sink_logits_H is None else (sink_logits_H.astype(jnp.float32),)
    run = backend.mosaic_call(
        functools.partial(_kernel, reach, blocks),
        name="mosaic_window_attention",
        out_type=(
            jax.ShapeDtypeStruct((*q_BLHC.shape[:3], value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, rows.positions.shape[1]), jnp.float32),
        ),
        num_warpgroups=COMPUTE_WARPGROUPS + 1,
        scratch={"scratch": _scratch(blocks, head_dim, value_dim, dtype)},
        target=reach.target,
    )
    of_rows = (rows.positions, rows.segments, rows.starts, rows.run_starts)
    out_BLHW, log_sum_BHL = run(q_BLHC, k_BLGC, v_BLGW, *of_rows, *sinks)
    return out_BLHW[:, :length], log_sum_BHL


class Place(NamedTuple):
    """A program's part, int32: the batch row, the head, the first query and the blocks of keys."""

    batch: jax.Array
    head: jax.Array
    first: jax.Array
    steps: Steps
    """Blocks of keys; those that are seen whole go first."""

    @property
    def num_whole(self) -> jax.Array:
        return self.steps.whole_end - self.steps.whole

    @property
    def num_blocks(self) -> jax.Array:
        return self.num_whole + self.steps.num_masked

    def block(self, i: Any) -> jax.Array:
        masked = self.steps.masked(i - self.num_whole)
        return jnp.where(i < self.num_whole, self.steps.whole + i, masked)


def _kernel(reach: Reach, blocks: Blocks, *refs, scratch: Scratch):
    q_BLHC, k_BLGC, v_BLGW, *rows, starts_BL, run_starts_BL = refs[:7]
    *sinks, out_BLHW, log_sum_BHL = refs[7:]
    sinks_H = sinks[0] if sinks else None
    batch, length, heads, _ = q_BLHC.shape
    num_queries = COMPUTE_WARPGROUPS * blocks.queries
    num_blocks = pl.cdiv(length, num_queries)
    warpgroup = lax.axis_index("warpgroup")  # asked for here first: the interpreter keeps it

    def over_programs(run) -> Any:
        """Calls run(place, programs before, steps before) for each of this core's programs.

        Returns how many programs and steps there were.
        """

        def each(loop, carry):
            rest, head = divide(loop.index[0], heads)
            row, block = divide(rest, num_blocks)
            first = (num_blocks - 1 - block) * num_queries
            borders = starts_BL[row, first], run_starts_BL[row, first + num_queries - 1]
            steps = key_blocks(reach, *borders, first, num_queries, blocks.keys)
            at = Place(row, head, first, steps)
            run(at, *carry)
            return carry[0] + 1, carry[1] + at.num_blocks

        none = (jnp.int32(0), jnp.int32(0))
        programs = (batch * heads * num_blocks,)
        return plgpu.nd_loop(programs, collective_axes="core", init_carry=none)(each)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        run = functools.partial(_copy_blocks, blocks, scratch, q_BLHC, k_BLGC, v_BLGW, *rows)
        num_programs, num_steps = over_programs(run)
        wait_free(scratch.queries, num_programs)
        wait_free(scratch.keys, num_steps)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        attend = functools.partial(_attend, reach, scratch, warpgroup, sinks_H)

        def run(at, number, step):
            pl.when(warpgroup == 1)(scratch.pass_turn)  # the other one begins
            out_MW, log_sum_M = attend(at, number, step)
            # Before the next queries: they are copied once both have given these back.
            pl.when(warpgroup == 0)(scratch.pass_turn)
            _write(scratch, at, warpgroup, out_MW, log_sum_M, out_BLHW, log_sum_BHL)

        over_programs(run)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_blocks(
    blocks: Blocks,
    scratch: Scratch,
    q_BLHC,
    k_BLGC,
    v_BLGW,
    positions_BL,
    segments_BL,
    at: Place,
    number,
    step,
) -> None:
    kv_head, _ = divide(at.head, q_BLHC.shape[2] // k_BLGC.shape[2])
    copies = []
    for warpgroup in range(COMPUTE_WARPGROUPS):
        mine = pl.ds(at.first + warpgroup * blocks.queries, blocks.queries)
        copies += [
            (q_BLHC.at[at.batch, mine, at.head], scratch.q_1AMC.at[:, warpgroup]),
            (positions_BL.at[at.batch, mine], scratch.q_positions_1AM.at[:, warpgroup]),
            (segments_BL.at[at.batch, mine], scratch.q_segments_1AM.at[:, warpgroup]),
        ]
    fill(scratch.queries, number, copies)

    def copy(i, _):
        keys = pl.ds(at.block(i) * blocks.keys, blocks.keys)
        copies = [
            (k_BLGC.at[at.batch, keys, kv_head], scratch.k_SNC),
            (v_BLGW.at[at.batch, keys, kv_head], scratch.v_SNW),
            (positions_BL.at[at.batch, keys], scratch.k_positions_SN),
            (segments_BL.at[at.batch, keys], scratch.k_segments_SN),
        ]
        fill(scratch.keys, step + i, copies)

    lax.fori_loop(0, at.num_blocks, copy, None)


def _attend(reach: Reach, scratch: Scratch, warpgroup, sinks_H, at: Place, number, step):
    """Returns a warpgroup's results, float32 [M, W], and the logarithms of its sums, [M]."""
    target = reach.target
    queries, head_dim = scratch.q_1AMC.shape[2:]
    keys, value_dim = scratch.v_SNW.shape[1:]
    wait_filled(scratch.queries, number)
    q_MC = scratch.q_1AMC.at[0, warpgroup]
    q_rows = [
        _over_block(read(ref.at[0, warpgroup], OF_ROW, target), 0, keys)
        for ref in (scratch.q_positions_1AM, scratch.q_segments_1AM)
    ]

    scale = LOG2_E / math.sqrt(head_dim)

    def attend(i, carry, is_masked):
        highest_M, sum_M, out_MW = carry
        slot = wait_filled(scratch.keys, step + i)
        k_NC, v_NW = scratch.k_SNC.at[slot], scratch.v_SNW.at[slot]
        scores_MN = product(q_MC, k_NC, target, meanwhile=scratch.pass_turn)
        if is_masked:
            k_rows = [
                _over_block(read(ref.at[slot], OF_COLUMN, target), 1, queries)
                for ref in (scratch.k_positions_SN, scratch.k_segments_SN)
            ]
            scores_MN = jnp.where(_sees(reach, q_rows, k_rows), scores_MN, -jnp.inf)
        new_M = jnp.maximum(highest_M, scores_MN.max(axis=1) * scale)
        shrink_M = jnp.exp2(highest_M - new_M)
        weights_MN = jnp.exp2(scores_MN * scale - _over_block(new_M, 0, keys))
        sum_M = sum_M * shrink_M + weights_MN.sum(axis=1)
        out_MW *= _over_block(shrink_M, 0, value_dim)
        narrow_MN = weights_MN.astype(v_NW.dtype)
        if scratch.turns is not None:  # all of the softmax before the other one's turn ends
            narrow_MN, sum_M, out_MW, new_M = lax.optimization_barrier(
                (narrow_MN, sum_M, out_MW, new_M)
            )
            scratch.pass_turn()
        out_MW = add_product(out_MW, narrow_MN, v_NW, target)
        give_back(scratch.keys, slot)
        return new_M, sum_M, out_MW

    highest_M = jnp.full((queries,), MASKED, jnp.float32)
    sum_M = jnp.zeros((queries,), jnp.float32)
    if sinks_H is not None:
        sink = sinks_H[at.head] * LOG2_E
        highest_M = jnp.maximum(highest_M, sink)
        sum_M = jnp.exp2(sink - highest_M)
    out_MW = spread(jnp.zeros((queries, value_dim), jnp.float32), SUMS, target)
    carry = (spread(highest_M, OF_ROW, target), spread(sum_M, OF_ROW, target), out_MW)
    carry = lax.fori_loop(0, at.num_whole, functools.partial(attend, is_masked=False), carry)
    highest_M, sum_M, out_MW = lax.fori_loop(
        at.num_whole, at.num_blocks, functools.partial(attend, is_masked=True), carry
    )
    if scratch.out_AMW is not None:
        give_back(scratch.queries, jnp.int32(0))
    sum_M = jnp.where(sum_M > 0.0, sum_M, 1.0)  # a row that sees nothing
    return out_MW / _over_block(sum_M, 0, value_dim), highest_M + jnp.log(sum_M) * LOG2_E


def _over_block(x: jax.Array, axis: int, size: int) -> jax.Array:
    """One value for each row (axis 0) or column (1), all along a block's other axis."""
    shape = (x.shape[0], size) if axis == 0 else (size, x.shape[0])
    return lax.broadcast_in_dim(x, shape, [axis])


def _sees(reach: Reach, q_rows: list[jax.Array], k_rows: list[jax.Array]) -> jax.Array:
    """Which of a block's keys its queries see, bool [M, N], by [positions, segments]."""
    window_size, num_sink_tokens = reach.window_size, reach.num_sink_tokens
    is_visible = visible(
        q_rows[0], k_rows[0], window_size=window_size, num_sink_tokens=num_sink_tokens
    )
    return is_visible & (q_rows[1] == k_rows[1])


def _write(
    scratch: Scratch, at: Place, warpgroup, out_MW, log_sum_M, out_BLHW, log_sum_BHL
) -> None:
    """Copies results to memory; rows past the last are clipped, as the copy is one of a block."""
    shares = scratch.out_AMW is None
    out = scratch.q_1AMC.at[0, warpgroup] if shares else scratch.out_AMW.at[warpgroup]
    log_sum = scratch.log_sum_AM.at[warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the block before
    out[...] = out_MW.astype(out.dtype)
    log_sum[...] = log_sum_M
    plgpu.commit_smem()
    rows = pl.ds(at.first + warpgroup * out.shape[0], out.shape[0])
    plgpu.copy_smem_to_gmem(out, out_BLHW.at[at.batch, rows, at.head])
    plgpu.copy_smem_to_gmem(log_sum, log_sum_BHL.at[at.batch, at.head, rows])
    if shares:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        give_back(scratch.queries, jnp.int32(0))
