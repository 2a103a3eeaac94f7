"""Split sequences for paged attention's Triton kernels: each part has its own softmax.

The pages of a sequence are dealt to several programs, so that few sequences still fill a GPU; each
leaves the sums of its softmax, and XLA adds them up (FlashDecoding, Dao et al. 2023).

B sequences, H query heads, R rows of a product (the query heads of a program), W width of values,
P pages, S positions of a block, N pages of a sequence, D parts of a sequence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.backend import divide, edge, load, mask_of, span, store
from kernels.window_attention.reference import MASKED, visible

LOG2_E = math.log2(math.e)
MOST_PARTS = 16


class Walk(NamedTuple):
    """How programs go through the positions of a sequence."""

    page_size: int
    block_size: int
    """Positions at a time, which divide a page."""
    window_size: int | None
    num_sink_tokens: int
    parts: int


class Sums(NamedTuple):
    """What a part leaves, float32: its softmax's sums over 2^highest, [B, D, H] and [..., W]."""

    out: Any
    highest: Any
    total: Any


Summed = Callable[[jax.Array], jax.Array]
Look = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Summed]]
"""(page, its positions, which are seen [S]) to scores in base 2, [R, S], and to a function of their
weights [R, S] that sums the values, [R, W]."""


def unsupported_reason(page_size: int, *widths: int) -> str | None:
    """What keeps the kernels from reading such pages, in a sentence; None: nothing."""
    if page_size < 16 or page_size & (page_size - 1):
        return f"page_size={page_size} must be a power of two from 16 on for the Triton kernel"
    if any(wide(width) != width for width in widths):
        return f"heads of {widths} channels must be powers of two from 16 on for the Triton kernel"
    return None


def num_parts(programs: int, wholes: int, pages: int) -> int:
    """Into how many parts sequences of so many pages go, to make about so many programs.

    Args:
      wholes: programs there would be if each had a whole sequence.
    """
    return min(MOST_PARTS, max(1, programs // wholes), pages)


def sums_shapes(batch: int, parts: int, heads: int, width: int) -> Sums:
    of_heads = jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32)
    out = jax.ShapeDtypeStruct((batch, parts, heads, width), jnp.float32)
    return Sums(out, of_heads, of_heads)


def added(sums: Sums, sink_logits_H: jax.Array | None = None) -> jax.Array:
    """One softmax of its parts, float32 [B, H, W]; zero for a sequence without positions."""
    out_BDHW, highest_BDH, sum_BDH = sums
    if sink_logits_H is not None:  # one more part, whose values are zero
        batch, _, heads, width = out_BDHW.shape
        sink_B1H = jnp.broadcast_to(sink_logits_H.astype(jnp.float32) * LOG2_E, (batch, 1, heads))
        is_part_B1H = sink_B1H > MASKED
        highest_BDH = jnp.concatenate([highest_BDH, jnp.maximum(sink_B1H, MASKED)], axis=1)
        sum_BDH = jnp.concatenate([sum_BDH, is_part_B1H.astype(jnp.float32)], axis=1)
        no_value_B1HW = jnp.zeros((batch, 1, heads, width), jnp.float32)
        out_BDHW = jnp.concatenate([out_BDHW, no_value_B1HW], axis=1)
    share_BDH = jnp.exp2(highest_BDH - highest_BDH.max(axis=1, keepdims=True))
    sum_BH = (share_BDH * sum_BDH).sum(axis=1)
    out_BHW = (share_BDH[..., None] * out_BDHW).sum(axis=1)
    return out_BHW / jnp.where(sum_BH > 0.0, sum_BH, 1.0)[..., None]


# --- Inside kernels ------------------------------------------------------------------------------


def softmax_over(
    walk: Walk,
    tables_BN: Any,
    lengths_B: Any,
    batch: jax.Array,
    part: jax.Array,
    *,
    shape: tuple[int, int],
    look: Look,
) -> Sums:
    """One part's sums over the positions that the last one sees: out [R, W], the others [R].

    Args:
      shape: (R, W).
    """
    length, size = lengths_B[batch], walk.block_size
    reach = {"window_size": walk.window_size, "num_sink_tokens": walk.num_sink_tokens}
    sink_blocks, first_block, count = _seen_blocks(length, size, **reach)
    per_part, _ = divide(count + walk.parts - 1, walk.parts)

    def step(i, carry):
        highest_R, sum_R, out_RW = carry
        block = jnp.where(i < sink_blocks, i, first_block + i - sink_blocks)
        page, offset = _in_page(block, walk)
        is_seen_S = visible(length - 1, block * size + span(0, size), **reach)
        scores_RS, summed = look(tables_BN[batch, page], pl.ds(offset, size), is_seen_S)
        is_seen_RS = jnp.broadcast_to(is_seen_S[None], scores_RS.shape)
        scores_RS = jnp.where(is_seen_RS, scores_RS, -jnp.inf)
        new_R = jnp.maximum(highest_R, scores_RS.max(axis=1))
        shrink_R, weights_RS = jnp.exp2(highest_R - new_R), jnp.exp2(scores_RS - new_R[:, None])
        sum_R = sum_R * shrink_R + weights_RS.sum(axis=1)
        return new_R, sum_R, out_RW * shrink_R[:, None] + summed(weights_RS)

    highest_R, sum_R = (jnp.full(shape[:1], x, jnp.float32) for x in (MASKED, 0.0))
    begin, end = part * per_part, jnp.minimum((part + 1) * per_part, count)
    carry = (highest_R, sum_R, jnp.zeros(shape, jnp.float32))
    highest_R, sum_R, out_RW = lax.fori_loop(begin, end, step, carry)
    return Sums(out_RW, highest_R, sum_R)


def _in_page(block: jax.Array, walk: Walk) -> tuple[jax.Array, Any]:
    """The page of a block among its sequence's, and the block's first position in it."""
    if walk.block_size == walk.page_size:
        return block, 0
    page, in_page = divide(block, walk.page_size // walk.block_size)
    return page, in_page * walk.block_size


def _seen_blocks(length, size, window_size, num_sink_tokens):
    """Blocks that are seen: how many with sinks before the window's, the window's first, all."""
    end, _ = divide(length + size - 1, size)
    if window_size is None:
        return jnp.int32(0), jnp.int32(0), end
    first, _ = divide(jnp.maximum(length - window_size, 0), size)
    sinks = jnp.minimum(-(-num_sink_tokens // size), first)
    return sinks, first, end - first + sinks


def write_sums(refs: Sums, sums: Sums, batch: Any, part: Any, heads: Any, is_head_R: Any) -> None:
    """Leaves a part's sums, of the heads that are."""
    width, columns = refs.out.shape[-1], sums.out.shape[1]
    store(refs.highest.at[batch, part, heads], sums.highest, is_head_R)
    store(refs.total.at[batch, part, heads], sums.total, is_head_R)
    mask_RW = mask_of(sums.out.shape, is_head_R, edge(0, columns, width))
    store(refs.out.at[batch, part, heads, pl.ds(0, columns)], sums.out, mask_RW)


def read(ref: Any, at: tuple[Any, ...], rows: int, is_row: jax.Array | None = None) -> jax.Array:
    """Rows of the last dim at a place; channels in a power of two from 16 on, with zeros."""
    width = ref.shape[-1]
    mask = mask_of((rows, wide(width)), is_row, edge(0, wide(width), width))
    return load(ref.at[(*at, pl.ds(0, wide(width)))], mask)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """Integers in the dtype of what they are multiplied with, which holds each; floats as is."""
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.integer) else x


def wide(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
