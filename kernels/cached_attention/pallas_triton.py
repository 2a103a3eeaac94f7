"""cached_attention as a Triton kernel: a program has some slots of a row for a tile of its tokens.

The query heads of a group, of all tokens of the tile, are the rows of each product. int8 keys and
values become floats in registers, without their scales; a latent that is loaded serves as key and
as value. The blocks of slots that a tile sees are dealt to several programs, whose sums XLA adds
up (paged_attention's parts.py).

T tokens, R rows of S slots, H query heads, G key/value heads, C head_dim, W width of values, N
tiles of M tokens, Q queries of a program (tokens by heads), B slots of a block, D parts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load, mask_of, span, store
from kernels.cached_attention import tiles
from kernels.cached_attention.state import Options, State
from kernels.paged_attention.parts import LOG2_E, Sums, added, num_parts, sums_shapes, wide
from kernels.window_attention.reference import MASKED, visible

PROGRAMS = 256
"""About two for each core of an A100 or H100."""
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Sizes(NamedTuple):
    """What a program works on at a time, and how it is compiled."""

    queries: int
    """Of all its tokens and heads, at most."""
    slots: int
    """A power of two from 16 on."""
    num_warps: int
    num_stages: int


FEW, FEW_WIDE, FEW_WIDE_INT8 = Sizes(16, 64, 4, 2), Sizes(16, 32, 4, 2), Sizes(16, 32, 8, 2)
"""One token of up to 16 heads in a group. Wide: more than 128 channels, and latents."""
MANY, MANY_INT8 = Sizes(64, 64, 8, 2), Sizes(64, 32, 4, 2)
MANY_WIDE, MANY_WIDE_INT8 = Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 2)
TOKENS_OF_LATENTS = Sizes(32, 32, 8, 2)
"""Several tokens with more than 256 channels: their values are looked through for NaN."""
EXACT, EXACT_WIDE = Sizes(32, 32, 8, 2), Sizes(16, 16, 4, 2)
"""float32, which goes without tensor cores."""
INTERPRETED = Sizes(32, 32, 4, 2)


class Plan(NamedTuple):
    """All that is static in a program."""

    options: Options
    kv_heads: int
    tile: int
    """Tokens of a tile."""
    heads: int
    """Query heads of a program, all of one group."""
    blocks: int
    """Programs that share the heads of a group."""
    slots: int
    parts: int
    pieces: tuple[tuple[int, int], ...]
    """(first channel, channels) of the pieces that keys are read in: a latent state's values are
    the first."""

    @property
    def num_queries(self) -> int:
        """Rows of a program's products."""
        return wide(self.tile * self.heads)


def unsupported_reason(q_THC: jax.Array, state: State) -> str | None:
    """What keeps the kernel from reading such a state, in a sentence; None: nothing."""
    for what, x, dtypes in (
        ("queries", q_THC, DTYPES),
        ("keys", state.k, (*DTYPES, jnp.int8)),
        ("values", state.k if state.v is None else state.v, (*DTYPES, jnp.int8)),
    ):
        if x.dtype not in dtypes:
            names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
            return f"{what} of {x.dtype} must be {names} for the Triton kernel"
        if x.dtype == jnp.int8 and 2**31 < x.size <= 2**32:  # Pallas takes 32 bits, and the sign
            return f"{what} of {x.size} bytes must be at most 2^31, or more than 2^32, for Triton"
    if state.tables_RN is not None and state.k.shape[1] % 16:
        return (
            f"pages of {state.k.shape[1]} positions must be a multiple of 16 for the Triton kernel"
        )
    return None


def is_slower(q_THC: jax.Array, state: State) -> bool:
    """Whether XLA was measured to be faster: latents in float32, which go without tensor cores in
    tiles of 16 x 16, took four times as long on an H100."""
    return q_THC.dtype == jnp.float32 and state.v is None


def cached_attention(
    q_THC: jax.Array,
    rows_T: jax.Array,
    positions_T: jax.Array,
    state: State,
    sink_logits_H: jax.Array | None,
    options: Options,
    *,
    target: Target,
    sizes: Sizes | None = None,
) -> jax.Array:
    """Returns the attention of each token over its row's slots, [T, H, W].

    Raises:
      NotImplementedError: a state that the kernel can't read.
    """
    reason = unsupported_reason(q_THC, state)
    if reason is not None:
        raise NotImplementedError(reason)
    num_tokens, heads, _ = q_THC.shape
    sizes = sizes or choose_sizes(q_THC, state, options, target)
    plan = make_plan(q_THC, state, options, sizes)
    table = tiles.cut(rows_T, positions_T, state, options, plan.tile, plan.slots)
    run = backend.triton_call(
        functools.partial(_kernel, plan=plan),
        name="cached_attention" if state.k_scales is None else "cached_attention_int8",
        num_programs=len(table.rows_N) * state.k.shape[2] * plan.blocks * plan.parts,
        out_shape=sums_shapes(num_tokens, plan.parts, heads, options.value_width),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        target=target,
    )
    out_THW = added(run(q_THC, state, table), sink_logits_H)
    is_real_T = (rows_T >= 0) & (positions_T >= 0)  # of others nothing was written
    return jnp.where(is_real_T[:, None, None], out_THW, 0.0).astype(q_THC.dtype)


def choose_sizes(q_THC: jax.Array, state: State, options: Options, target: Target) -> Sizes:
    if target.platform == "interpret":
        return INTERPRETED
    width, is_int8 = max(q_THC.shape[2], options.value_width), state.k.dtype == jnp.int8
    is_wide = state.v is None or width > 128
    in_group, is_one = q_THC.shape[1] // state.k.shape[2], _has_one_token(q_THC, state, options)
    if q_THC.dtype == jnp.float32:
        return EXACT_WIDE if is_wide else EXACT
    if is_one and in_group <= 16:
        return (FEW_WIDE_INT8 if is_int8 else FEW_WIDE) if is_wide else FEW
    if not is_wide:
        return MANY_INT8 if is_int8 else MANY
    if is_int8:
        return MANY_WIDE_INT8
    has_tokens = not is_one and in_group < MANY_WIDE.queries
    return TOKENS_OF_LATENTS if has_tokens and width > 256 else MANY_WIDE


def _has_one_token(q_THC: jax.Array, state: State, options: Options) -> bool:
    """Whether a tile has one token: where rows have one each, or mostly."""
    return options.one_per_row or len(q_THC) <= state.num_rows


def make_plan(q_THC: jax.Array, state: State, options: Options, sizes: Sizes) -> Plan:
    (num_tokens, heads, width), kv_heads = q_THC.shape, state.k.shape[2]
    in_group = heads // kv_heads
    of_program = min(in_group, sizes.queries)
    tile = min(sizes.queries // of_program, num_tokens)
    if _has_one_token(q_THC, state, options):
        tile = 1
    blocks, slots, length = pl.cdiv(in_group, of_program), sizes.slots, state.k.shape[1]
    if state.tables_RN is not None:
        slots = min(slots, length & -length)  # the largest power of two that divides a page
        length *= state.tables_RN.shape[1]
    count = tiles.num_tiles(num_tokens, state.num_rows, tile)
    parts = num_parts(PROGRAMS, count * kv_heads * blocks, pl.cdiv(length, slots))
    pieces = ((0, width),)
    if state.v is None and options.value_width < width:
        pieces = ((0, options.value_width), (options.value_width, width - options.value_width))
    return Plan(options, kv_heads, tile, of_program, blocks, slots, parts, pieces)


# --- Inside the kernel ---------------------------------------------------------------------------


class Queries(NamedTuple):
    """The queries of a program; tokens past the last have no one."""

    is_one_Q: jax.Array
    token_Q: jax.Array
    head_Q: jax.Array
    position_Q: jax.Array
    """-1 where there is none."""

    def channels(self, ref: Any, *between: Any, start: int, width: int) -> tuple[Any, Any]:
        """Where they lie in [T, ..., H, C], and which of it there is, [Q, channels made wide]."""
        shape = (len(self.token_Q), wide(width))
        at = [jnp.broadcast_to(x_Q[:, None], shape) for x_Q in (self.token_Q, self.head_Q)]
        channel = jnp.broadcast_to(span(start, shape[1])[None], shape)
        mask = mask_of(shape, self.is_one_Q, edge(0, shape[1], width))
        middle = [jnp.full(shape, x, jnp.int32) for x in between]
        return ref.at[(at[0], *middle, at[1], channel)], mask


def _kernel(q_THC, state, table, *out, plan):
    # The programs with other heads of a group follow each other: they read the same slots.
    rest, block = divide(pl.program_id(0), plan.blocks)
    rest, part = divide(rest, plan.parts)
    tile, kv_head = divide(rest, plan.kv_heads)
    queries = _queries(table, tile, kv_head, block, q_THC, plan)
    q_pieces = [
        load(*queries.channels(q_THC, start=start, width=width)) for start, width in plan.pieces
    ]
    look = functools.partial(_look, state, plan, table.rows_N[tile], kv_head, q_pieces)
    sums, refs = _softmax(table, tile, part, plan, queries.position_Q, look), Sums(*out)
    at_Q = (queries.token_Q, jnp.full_like(queries.token_Q, part), queries.head_Q)
    store(refs.highest.at[at_Q], sums.highest, queries.is_one_Q)
    store(refs.total.at[at_Q], sums.total, queries.is_one_Q)
    places, mask = queries.channels(refs.out, part, start=0, width=plan.options.value_width)
    store(places, sums.out, mask)


def _queries(table, tile, kv_head, block, q_THC, plan) -> Queries:
    num_tokens, in_group = q_THC.shape[0], q_THC.shape[1] // plan.kv_heads
    of_tile_Q, of_group_Q = divide(span(0, plan.num_queries), plan.heads)
    of_group_Q += block * plan.heads
    at_Q = (tile, jnp.minimum(of_tile_Q, plan.tile - 1))
    token_Q, position_Q = load(table.tokens_NM.at[at_Q]), load(table.positions_NM.at[at_Q])
    is_one_Q = (of_tile_Q < plan.tile) & (of_group_Q < in_group) & (token_Q >= 0)
    token_Q = jnp.where(is_one_Q, token_Q, num_tokens)
    head_Q = kv_head * in_group + of_group_Q
    return Queries(is_one_Q, token_Q, head_Q, jnp.where(is_one_Q, position_Q, -1))


def _softmax(table, tile, part, plan, position_Q, look) -> Sums:
    """One part's sums over the blocks that the tile sees: out [Q, W], the others [Q]."""
    sinks, first = table.sink_blocks_N[tile], table.first_blocks_N[tile]
    count = table.counts_N[tile]
    per_part, _ = divide(count + plan.parts - 1, plan.parts)

    def step(i, carry):
        highest_Q, sum_Q, out_QW = carry
        scores_QB, summed = look(jnp.where(i < sinks, i, first + i - sinks), position_Q)
        new_Q = jnp.maximum(highest_Q, scores_QB.max(axis=1))
        shrink_Q, weights_QB = jnp.exp2(highest_Q - new_Q), jnp.exp2(scores_QB - new_Q[:, None])
        sum_Q = sum_Q * shrink_Q + weights_QB.sum(axis=1)
        return new_Q, sum_Q, out_QW * shrink_Q[:, None] + summed(weights_QB)

    shape = (plan.num_queries, wide(plan.options.value_width))
    highest_Q, sum_Q = (jnp.full(shape[:1], x, jnp.float32) for x in (MASKED, 0.0))
    begin, end = part * per_part, jnp.minimum((part + 1) * per_part, count)
    carry = (highest_Q, sum_Q, jnp.zeros(shape, jnp.float32))
    highest_Q, sum_Q, out_QW = lax.fori_loop(begin, end, step, carry)
    return Sums(out_QW, highest_Q, sum_Q)


def _look(state, plan, row, kv_head, q_pieces, block, position_Q):
    """Scores in base 2 of a block's slots, -inf where unseen, [Q, B]; and what sums the values.

    Slots that no query sees are not read; what some see may still hold anything for the others.
    """
    of_row, slot_B, positions_B = _slots(state, plan, row, block)
    dtype, shape = q_pieces[0].dtype, (plan.num_queries, plan.slots)
    is_seen_QB = visible(
        jnp.broadcast_to(position_Q[:, None], shape),
        jnp.broadcast_to(positions_B[None], shape),
        window_size=plan.options.window_size,
        num_sink_tokens=plan.options.num_sink_tokens,
    )
    is_used_B = is_seen_QB.astype(jnp.int32).max(axis=0) > 0

    def read(ref, start, width):
        of_block = (plan.slots, wide(width))
        slot_BC = jnp.broadcast_to(slot_B[:, None], of_block)
        channel_BC = jnp.broadcast_to(span(start, of_block[1])[None], of_block)
        mask = mask_of(of_block, is_used_B, edge(0, of_block[1], width))
        return load(ref.at[of_row, slot_BC, kv_head, channel_BC], mask).astype(dtype)

    def scales(ref):
        return load(ref.at[of_row, slot_B, kv_head], is_used_B).astype(jnp.float32)[None]

    k_pieces = [read(state.k, *piece) for piece in plan.pieces]
    scores_QB = sum(dot(q, k.T) for q, k in zip(q_pieces, k_pieces, strict=True))
    scores_QB = scores_QB * (LOG2_E * plan.options.scale)
    if state.k_scales is not None:
        scores_QB *= scales(state.k_scales)

    def summed(weights_QB):
        value_scales, v_BW = state.k_scales, k_pieces[0]
        if state.v is not None:
            value_scales, v_BW = state.v_scales, read(state.v, 0, plan.options.value_width)
        if value_scales is not None:
            weights_QB = jnp.where(is_seen_QB, weights_QB * scales(value_scales), 0.0)
        elif plan.tile > 1:  # 0 * NaN would be NaN
            is_finite_BW = jnp.abs(v_BW.astype(jnp.float32)) < jnp.inf
            is_finite_B = is_finite_BW.astype(jnp.int32).min(axis=1) > 0
            is_nan_QB = is_seen_QB & ~jnp.broadcast_to(is_finite_B[None], shape)
            weights_QB = jnp.where(is_nan_QB, jnp.nan, weights_QB)
            v_BW = jnp.where(is_finite_BW, v_BW, jnp.zeros_like(v_BW))
        return dot(weights_QB.astype(dtype), v_BW)

    return jnp.where(is_seen_QB, scores_QB, -jnp.inf), summed


def _slots(state, plan, row, block):
    """The row or page that a block lies in, its slots there [B], and their positions [B].

    Past a row's last slot the position is -1.
    """
    first, size = block * plan.slots, plan.slots
    if state.tables_RN is not None:
        page, offset = divide(first, state.k.shape[1])
        return state.tables_RN[row, page], span(offset, size), span(first, size)
    is_slot_B = edge(first, size, state.k.shape[1])
    positions_B = load(state.slot_positions_RS.at[row, pl.ds(first, size)], is_slot_B)
    if is_slot_B is not None:
        positions_B = jnp.where(is_slot_B, positions_B, -1)
    return row, span(first, size), positions_B
