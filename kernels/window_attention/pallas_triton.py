"""window_attention as Triton kernels: blocks of scores in registers, softmax on the fly.

A program owns a block of queries of one head (forward, gradient of q) or a block of keys of one
key/value head (gradients of k and v), and loops over the blocks of the other kind that it can see:
those within the window, not before the segment of its first row nor after that of its last one, and
those of the segment's sinks. Within a block, positions and segments decide, as in the reference;
blocks whose queries see all of its keys go first, and nothing is asked of them. The softmax runs
along (FlashAttention, Dao et al. 2022); the backward pass makes the scores again.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values; a block has M
queries and N keys.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load, mask_of, span, store
from kernels.window_attention.reference import MASKED, visible

LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Rows of a block, powers of two from 16 on, and how the kernel is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Kernels(NamedTuple):
    """The blocks of the three kernels; none spills (compiled.json)."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


NARROW = Kernels(Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2))
"""head_dim up to 128."""
NARROW_HOPPER = Kernels(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2))
"""The same on Hopper, the fastest of those measured (docs/gpu_results)."""
WIDE = Kernels(Blocks(64, 32, 4, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2))
"""Wider heads."""
EXACT = Kernels(*[Blocks(32, 32, 8, 2)] * 3)
"""float32, which goes without tensor cores."""
INTERPRETED = Kernels(*[Blocks(32, 16, 4, 2)] * 3)
LONGEST_BLOCK = 128


class Reach(NamedTuple):
    """What a query sees, and what the kernels run on."""

    window_size: int | None
    num_sink_tokens: int
    target: Target
    kernels: Kernels | None = None
    """None: chosen by the shapes."""

    def blocks(self, q_BLHC: jax.Array) -> Kernels:
        return self.kernels or choose_kernels(q_BLHC.shape[-1], q_BLHC.dtype.itemsize, self.target)


class Rows(NamedTuple):
    """int32 [B, L padded to whole blocks], of each row; padding has the position -1."""

    positions: jax.Array
    segments: jax.Array
    starts: jax.Array
    """First row of the row's segment."""
    ends: jax.Array
    """One past its last row."""
    run_starts: jax.Array
    """First row of the row's run: tokens of one segment whose positions rise by one."""
    run_ends: jax.Array
    """One past its last row."""


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
    kernels: Kernels | None = None,
) -> jax.Array:
    """Returns the attention of each row over the visible rows of its segment, [B, L, H, W].

    Differentiable in q, k, v and sink_logits. A row that sees nothing gets zeros.
    """
    reach = Reach(window_size, num_sink_tokens, target, kernels)
    rows = rows_of(positions_BL, segments_BL)
    return _attention(reach, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows)


def rows_of(positions_BL: jax.Array, segments_BL: jax.Array) -> Rows:
    length = segments_BL.shape[1]
    is_new_segment_BL = segments_BL[:, 1:] != segments_BL[:, :-1]
    is_gap_BL = (positions_BL[:, 1:] != positions_BL[:, :-1] + 1) | (positions_BL[:, :-1] < 0)
    starts_BL, ends_BL = _spans(is_new_segment_BL)
    run_starts_BL, run_ends_BL = _spans(is_new_segment_BL | is_gap_BL)

    def padded(x_BL: jax.Array, value: int) -> jax.Array:
        widths = ((0, 0), (0, _padded(length) - length))
        return jnp.pad(x_BL.astype(jnp.int32), widths, constant_values=value)

    return Rows(
        padded(positions_BL, -1),
        *(padded(x_BL, 0) for x_BL in (segments_BL, starts_BL, ends_BL)),
        run_starts=padded(run_starts_BL, length),  # no run that begins earlier has them
        run_ends=padded(run_ends_BL, 0),
    )


def _spans(is_border_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row and end of each row's span, int32 [B, L]; is_border: between a row and the next."""
    batch, borders = is_border_BL.shape
    row_BL = lax.broadcasted_iota(jnp.int32, (batch, borders + 1), 1)
    is_first_BL = jnp.pad(is_border_BL, ((0, 0), (1, 0)))
    is_last_BL = jnp.pad(is_border_BL, ((0, 0), (0, 1)))
    starts_BL = lax.cummax(jnp.where(is_first_BL, row_BL, 0), axis=1)
    ends_BL = lax.cummin(jnp.where(is_last_BL, row_BL + 1, borders + 1), axis=1, reverse=True)
    return starts_BL, ends_BL


def choose_kernels(head_dim: int, itemsize: int, target: Target) -> Kernels:
    if target.platform == "interpret":
        return INTERPRETED
    if itemsize > 2:
        return EXACT
    if head_dim > 128:
        return WIDE
    return NARROW_HOPPER if target.platform == "cuda" and target.capability >= 90 else NARROW


def _padded(length: int) -> int:
    """length in whole blocks of every kernel."""
    return -(-length // LONGEST_BLOCK) * LONGEST_BLOCK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(reach, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows):
    return _run_forward(reach, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows)[0]


def _forward(reach, *operands):
    out_BLHW, log_sum_BHL = _run_forward(reach, *operands)
    return out_BLHW, (*operands, out_BLHW, log_sum_BHL)


def backward(reach, residuals, dout_BLHW):
    """The gradients of q, k, v and the sinks' logits (none of rows), by `_forward`'s residuals."""
    q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows, out_BLHW, log_sum_BHL = residuals
    # Of a row's softmax: what its outputs' gradient weighs, subtracted from that of each score.
    product_BLHW = dout_BLHW.astype(jnp.float32) * out_BLHW.astype(jnp.float32)
    weighed_BHL = product_BLHW.sum(axis=-1).transpose(0, 2, 1)
    padding = ((0, 0), (0, 0), (0, log_sum_BHL.shape[2] - weighed_BHL.shape[2]))
    padded_BHL = jnp.pad(weighed_BHL, padding)
    operands = (rows, q_BLHC, k_BLGC, v_BLGW, dout_BLHW, log_sum_BHL, padded_BHL)
    dq_BLHC = _run_queries_gradient(reach, *operands)
    dk_BLGC, dv_BLGW = _run_keys_gradient(reach, *operands)
    dsinks_H = None
    if sink_logits_H is not None:  # a sink's value is zero: only the subtracted part is left
        sinks_1H1 = sink_logits_H.astype(jnp.float32)[None, :, None] * LOG2_E
        share_BHL = jnp.exp2(sinks_1H1 - log_sum_BHL[:, :, : q_BLHC.shape[1]])
        dsinks_H = -(share_BHL * weighed_BHL).sum(axis=(0, 2)).astype(sink_logits_H.dtype)
    return dq_BLHC, dk_BLGC, dv_BLGW, dsinks_H, None


_attention.defvjp(_forward, backward)


# --- Inside kernels ------------------------------------------------------------------------------


def _read(ref_BLHC: Any, batch: Any, head: Any, start: Any, rows: int) -> jax.Array:
    """Rows of one head, [rows, C]; C in a power of two from 16 on, with zeros.

    Rows past the last are read as the last one: their position says that nothing sees them.
    """
    length, width = ref_BLHC.shape[1], ref_BLHC.shape[3]
    shape = (rows, _wide(width))
    row, channel = span(start, rows), span(0, _wide(width))
    if length % rows:
        row = jnp.minimum(row, length - 1)
    at = [jnp.broadcast_to(index, shape) for index in (row[:, None], channel[None])]
    mask = mask_of(shape, columns=edge(0, _wide(width), width))
    return load(ref_BLHC.at[batch, at[0], head, at[1]], mask)


def _write(ref_BLHC: Any, values: jax.Array, batch: Any, head: Any, start: Any) -> None:
    rows, wide = values.shape
    length, width = ref_BLHC.shape[1], ref_BLHC.shape[3]
    mask = mask_of((rows, wide), edge(start, rows, length), edge(0, wide, width))
    row, channel = span(start, rows)[:, None], span(0, wide)[None]
    at = [jnp.broadcast_to(index, values.shape) for index in (row, channel)]
    store(ref_BLHC.at[batch, at[0], head, at[1]], values, mask)


def _wide(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _sees(rows: Rows, reach: Reach, batch: Any, queries: Any, keys: Any) -> jax.Array:
    """Which of a block's keys its queries see, bool [M, N]."""
    q_segments_M, k_segments_N = rows.segments[batch, queries], rows.segments[batch, keys]
    return visible(
        rows.positions[batch, queries][:, None],
        rows.positions[batch, keys][None],
        window_size=reach.window_size,
        num_sink_tokens=reach.num_sink_tokens,
    ) & (q_segments_M[:, None] == k_segments_N[None])


class Steps(NamedTuple):
    """Blocks that a block of the other kind sees, int32: those without sinks are first to end - 1.

    Of the ones from `whole` to before `whole_end` it sees every row.
    """

    first_sink: Any
    num_sink_tokens: Any
    """Blocks that only sinks make visible, which lie before the others."""
    first: Any
    whole: Any
    whole_end: Any
    end: Any

    @property
    def num_masked(self) -> Any:
        return self.num_sink_tokens + (self.whole - self.first) + (self.end - self.whole_end)

    def masked(self, i: Any) -> Any:
        """The i-th of the blocks that it sees a part of."""
        rest = i - self.num_sink_tokens
        before = self.whole - self.first
        block = jnp.where(rest < before, self.first + rest, self.whole_end + rest - before)
        return jnp.where(i < self.num_sink_tokens, self.first_sink + i, block)


def key_blocks(
    reach: Reach, start: Any, run_start: Any, first_query: Any, num_queries: int, num_keys: int
) -> Steps:
    """The blocks of keys that a block of queries sees.

    Args:
      start: of the segment of the first query.
      run_start: of the run of the last query.
    """
    first_key, first_whole = start, run_start
    if reach.window_size is not None:
        first_key = jnp.maximum(start, first_query - (reach.window_size - 1))
        last_query = first_query + num_queries - 1
        first_whole = jnp.maximum(run_start, last_query - (reach.window_size - 1))
    first, _ = divide(first_key, num_keys)
    end, _ = divide(first_query + num_queries + num_keys - 1, num_keys)
    first_sink = num_sink_tokens = jnp.int32(0)
    if reach.window_size is not None and reach.num_sink_tokens:
        # A segment that began before the window is that of the first query.
        first_sink, _ = divide(start, num_keys)
        end_sink, _ = divide(start + reach.num_sink_tokens + num_keys - 1, num_keys)
        num_sink_tokens = jnp.maximum(jnp.minimum(end_sink, first) - first_sink, 0)
    whole, _ = divide(first_whole + num_keys - 1, num_keys)
    whole_end, _ = divide(first_query + 1, num_keys)
    whole = jnp.clip(whole, first, end)
    return Steps(first_sink, num_sink_tokens, first, whole, jnp.clip(whole_end, whole, end), end)


def _over_keys(rows: Rows, reach: Reach, batch: Any, first_query: Any, blocks: Blocks, step, carry):
    """Calls step(block of keys, carry, is_masked) for each block that a block of queries sees."""
    steps = key_blocks(
        reach,
        rows.starts[batch, first_query],
        rows.run_starts[batch, first_query + blocks.queries - 1],
        first_query,
        blocks.queries,
        blocks.keys,
    )
    carry = lax.fori_loop(
        steps.whole, steps.whole_end, lambda j, carry: step(j, carry, False), carry
    )
    return lax.fori_loop(
        0, steps.num_masked, lambda i, carry: step(steps.masked(i), carry, True), carry
    )


def _query_program(num_heads: int, num_blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch row, head and block of queries of a program.

    Heads go together; the last blocks, which see the most, go first.
    """
    rest, head = divide(pl.program_id(0), num_heads)
    batch, block = divide(rest, num_blocks)
    return batch, head, num_blocks - 1 - block


# --- Forward -------------------------------------------------------------------------------------


def _run_forward(reach, q_BLHC, k_BLGC, v_BLGW, sink_logits_H, rows):
    """Returns (out [B, L, H, W], base-2 log of each row's sum of exponentials [B, H, L padded])."""
    batch, length, heads, _ = q_BLHC.shape
    blocks = reach.blocks(q_BLHC).forward
    num_blocks = pl.cdiv(length, blocks.queries)
    run = backend.triton_call(
        functools.partial(_forward_kernel, reach=reach, blocks=blocks, num_blocks=num_blocks),
        name="window_attention",
        num_programs=batch * heads * num_blocks,
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, heads, v_BLGW.shape[-1]), q_BLHC.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows.positions.shape[1]), jnp.float32),
        ),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        target=reach.target,
    )
    return run(rows, sink_logits_H, q_BLHC, k_BLGC, v_BLGW)


def _forward_kernel(
    rows, sinks_H, q_BLHC, k_BLGC, v_BLGW, out_BLHW, log_sum_BHL, *, reach, blocks, num_blocks
):
    heads, kv_heads = q_BLHC.shape[2], k_BLGC.shape[2]
    batch, head, block = _query_program(heads, num_blocks)
    kv_head, _ = divide(head, heads // kv_heads)
    first = block * blocks.queries
    queries = pl.ds(first, blocks.queries)
    q_MC = _read(q_BLHC, batch, head, first, blocks.queries)

    def step(j, carry, is_masked):
        highest_M, sum_M, out_MW = carry
        keys = pl.ds(j * blocks.keys, blocks.keys)
        k_NC = _read(k_BLGC, batch, kv_head, j * blocks.keys, blocks.keys)
        scores_MN = dot(q_MC, k_NC.T) * (LOG2_E / math.sqrt(q_BLHC.shape[3]))
        if is_masked:
            scores_MN = jnp.where(_sees(rows, reach, batch, queries, keys), scores_MN, -jnp.inf)
        new_M = jnp.maximum(highest_M, scores_MN.max(axis=1))
        shrink_M, weights_MN = jnp.exp2(highest_M - new_M), jnp.exp2(scores_MN - new_M[:, None])
        v_NW = _read(v_BLGW, batch, kv_head, j * blocks.keys, blocks.keys)
        out_MW = out_MW * shrink_M[:, None] + dot(weights_MN.astype(v_NW.dtype), v_NW)
        return new_M, sum_M * shrink_M + weights_MN.sum(axis=1), out_MW

    highest_M = jnp.full((blocks.queries,), MASKED, jnp.float32)
    sum_M = jnp.zeros((blocks.queries,), jnp.float32)
    if sinks_H is not None:
        sink = sinks_H[head].astype(jnp.float32) * LOG2_E
        highest_M = jnp.maximum(highest_M, sink)
        sum_M = jnp.exp2(sink - highest_M)
    out_MW = jnp.zeros((blocks.queries, _wide(v_BLGW.shape[3])), jnp.float32)
    carry = (highest_M, sum_M, out_MW)
    highest_M, sum_M, out_MW = _over_keys(rows, reach, batch, first, blocks, step, carry)
    sum_M = jnp.where(sum_M > 0.0, sum_M, 1.0)  # a row that sees nothing
    _write(out_BLHW, out_MW / sum_M[:, None], batch, head, first)
    store(log_sum_BHL.at[batch, head, queries], highest_M + jnp.log2(sum_M))


# --- Backward ------------------------------------------------------------------------------------


def _run_queries_gradient(reach, rows, q_BLHC, *operands):
    batch, length, heads, _ = q_BLHC.shape
    blocks = reach.blocks(q_BLHC).queries
    num_blocks = pl.cdiv(length, blocks.queries)
    run = backend.triton_call(
        functools.partial(_queries_kernel, reach=reach, blocks=blocks, num_blocks=num_blocks),
        name="window_attention_dq",
        num_programs=batch * heads * num_blocks,
        out_shape=jax.ShapeDtypeStruct(q_BLHC.shape, q_BLHC.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        target=reach.target,
    )
    return run(rows, q_BLHC, *operands)


def _queries_kernel(
    rows,
    q_BLHC,
    k_BLGC,
    v_BLGW,
    dout_BLHW,
    log_sum_BHL,
    weighed_BHL,
    dq_BLHC,
    *,
    reach,
    blocks,
    num_blocks,
):
    heads, kv_heads = q_BLHC.shape[2], k_BLGC.shape[2]
    batch, head, block = _query_program(heads, num_blocks)
    kv_head, _ = divide(head, heads // kv_heads)
    scale = 1.0 / math.sqrt(q_BLHC.shape[3])
    first = block * blocks.queries
    queries = pl.ds(first, blocks.queries)
    q_MC = _read(q_BLHC, batch, head, first, blocks.queries)
    dout_MW = _read(dout_BLHW, batch, head, first, blocks.queries)
    log_sum_M1 = load(log_sum_BHL.at[batch, head, queries])[:, None]
    weighed_M1 = load(weighed_BHL.at[batch, head, queries])[:, None]

    def step(j, dq_MC, is_masked):
        keys = pl.ds(j * blocks.keys, blocks.keys)
        k_NC = _read(k_BLGC, batch, kv_head, j * blocks.keys, blocks.keys)
        v_NW = _read(v_BLGW, batch, kv_head, j * blocks.keys, blocks.keys)
        scores_MN = dot(q_MC, k_NC.T) * (LOG2_E * scale)
        if is_masked:
            scores_MN = jnp.where(_sees(rows, reach, batch, queries, keys), scores_MN, -jnp.inf)
        weights_MN = jnp.exp2(scores_MN - log_sum_M1)
        dscores_MN = weights_MN * (dot(dout_MW, v_NW.T) - weighed_M1)
        return dq_MC + dot(dscores_MN.astype(k_NC.dtype), k_NC)

    dq_MC = jnp.zeros(q_MC.shape, jnp.float32)
    dq_MC = _over_keys(rows, reach, batch, first, blocks, step, dq_MC)
    _write(dq_BLHC, dq_MC * scale, batch, head, first)


def _run_keys_gradient(reach, rows, q_BLHC, k_BLGC, v_BLGW, *operands):
    batch, length, kv_heads, _ = k_BLGC.shape
    blocks = reach.blocks(q_BLHC).keys
    num_blocks = pl.cdiv(length, blocks.keys)
    run = backend.triton_call(
        functools.partial(_keys_kernel, reach=reach, blocks=blocks, num_blocks=num_blocks),
        name="window_attention_dkv",
        num_programs=batch * kv_heads * num_blocks,
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BLGC, v_BLGW)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        target=reach.target,
    )
    return run(rows, q_BLHC, k_BLGC, v_BLGW, *operands)


def _keys_kernel(
    rows,
    q_BLHC,
    k_BLGC,
    v_BLGW,
    dout_BLHW,
    log_sum_BHL,
    weighed_BHL,
    dk_BLGC,
    dv_BLGW,
    *,
    reach,
    blocks,
    num_blocks,
):
    heads, kv_heads = q_BLHC.shape[2], k_BLGC.shape[2]
    scale = 1.0 / math.sqrt(q_BLHC.shape[3])
    rest, kv_head = divide(pl.program_id(0), kv_heads)
    batch, block = divide(rest, num_blocks)  # the first blocks, which most queries see, first
    first = block * blocks.keys
    keys = pl.ds(first, blocks.keys)
    k_NC = _read(k_BLGC, batch, kv_head, first, blocks.keys)
    v_NW = _read(v_BLGW, batch, kv_head, first, blocks.keys)
    steps = _query_blocks(rows, reach, batch, first, q_BLHC.shape[1], blocks)
    in_group = heads // kv_heads

    def step(of_group, block, carry, is_masked):
        dk_NC, dv_NW = carry
        head = kv_head * in_group + of_group
        start = block * blocks.queries
        queries = pl.ds(start, blocks.queries)
        q_MC = _read(q_BLHC, batch, head, start, blocks.queries)
        dout_MW = _read(dout_BLHW, batch, head, start, blocks.queries)
        scores_NM = dot(k_NC, q_MC.T) * (LOG2_E * scale)
        if is_masked:
            is_seen_NM = _sees(rows, reach, batch, queries, keys).T
            scores_NM = jnp.where(is_seen_NM, scores_NM, -jnp.inf)
        weights_NM = jnp.exp2(scores_NM - load(log_sum_BHL.at[batch, head, queries])[None])
        dv_NW += dot(weights_NM.astype(dout_MW.dtype), dout_MW)
        weighed_1M = load(weighed_BHL.at[batch, head, queries])[None]
        dscores_NM = weights_NM * (dot(v_NW, dout_MW.T) - weighed_1M)
        return dk_NC + dot(dscores_NM.astype(q_MC.dtype), q_MC), dv_NW

    num_whole = steps.whole_end - steps.whole

    def whole(i, carry):
        of_group, block = divide(i, num_whole)
        return step(of_group, steps.whole + block, carry, False)

    def masked(i, carry):
        of_group, block = divide(i, steps.num_masked)
        return step(of_group, steps.masked(block), carry, True)

    carry = (jnp.zeros(k_NC.shape, jnp.float32), jnp.zeros(v_NW.shape, jnp.float32))
    carry = lax.fori_loop(0, num_whole * in_group, whole, carry)
    dk_NC, dv_NW = lax.fori_loop(0, steps.num_masked * in_group, masked, carry)
    _write(dk_BLGC, dk_NC * scale, batch, kv_head, first)
    _write(dv_BLGW, dv_NW, batch, kv_head, first)


def _query_blocks(rows, reach, batch, first_key, length, blocks) -> Steps:
    """The blocks of queries that see a block of keys.

    One with sinks of the segment of its last row is seen up to that segment's end.
    """
    last_key = jnp.minimum(first_key + blocks.keys, length) - 1
    end, end_whole = rows.ends[batch, last_key], rows.run_ends[batch, first_key]
    if reach.window_size is not None:
        in_window = jnp.minimum(end, last_key + reach.window_size)
        has_sinks = rows.starts[batch, last_key] + reach.num_sink_tokens > first_key
        end = jnp.where(has_sinks, end, in_window) if reach.num_sink_tokens else in_window
        end_whole = jnp.minimum(end_whole, first_key + reach.window_size)
    first, _ = divide(first_key, blocks.queries)
    last, _ = divide(end + blocks.queries - 1, blocks.queries)
    whole, _ = divide(first_key + blocks.keys - 1 + blocks.queries - 1, blocks.queries)
    whole = jnp.clip(whole, first, last)
    whole_end = jnp.clip(divide(end_whole, blocks.queries)[0], whole, last)
    return Steps(jnp.int32(0), jnp.int32(0), first, whole, whole_end, last)
