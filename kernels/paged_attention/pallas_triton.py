"""paged_attention as a Triton kernel: a program has some pages of one sequence, for one k/v head.

The query heads of a group are the rows of each product, padded to what tensor cores take. The pages
of a sequence are dealt to several programs, so that few sequences still fill a GPU; each leaves the
sums of its softmax, and XLA adds them up (FlashDecoding, Dao et al. 2023).

B sequences, H query heads, G key/value heads, R query heads of a group, C head_dim, W width of
values, P pages of S positions, N pages of a sequence, D programs of a sequence and group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load, mask_of, span, store
from kernels.window_attention.reference import MASKED, visible

LOG2_E = math.log2(math.e)
PROGRAMS = 256
"""About two for each core of an A100 or H100."""
MOST_PARTS = 16
NUM_WARPS, NUM_STAGES = 4, 2


def lacks(page_size: int, *widths: int) -> str | None:
    """What keeps the kernel from reading such pages, in a sentence; None: nothing."""
    if page_size < 16 or page_size & (page_size - 1):
        return f"page_size={page_size} must be a power of two from 16 on for the Triton kernel"
    if any(_wide(width) != width for width in widths):
        return f"heads of {widths} channels must be powers of two from 16 on for the Triton kernel"
    return None


def paged_attention(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    window_size: int | None,
    num_sinks: int,
    sink_logits_H: jax.Array | None = None,
    target: Target,
) -> jax.Array:
    """Returns the attention of each sequence's last position over its pages, [B, H, W].

    Raises:
      NotImplementedError: pages of a size that the kernel lacks.
    """
    lack = lacks(k_pages_PSGC.shape[1], q_BHC.shape[-1], v_pages_PSGW.shape[-1])
    if lack is not None:
        raise NotImplementedError(lack)
    (batch, heads, _), (*_, kv_heads, width) = q_BHC.shape, v_pages_PSGW.shape
    parts = min(MOST_PARTS, max(1, PROGRAMS // (batch * kv_heads)), tables_BN.shape[1])
    kernel = functools.partial(_kernel, window_size=window_size, num_sinks=num_sinks)
    run = backend.triton_call(
        kernel,
        name="paged_attention",
        num_programs=batch * kv_heads * parts,
        out_shape=(
            jax.ShapeDtypeStruct((batch, parts, heads, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32),
        ),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        target=target,
    )
    out_BDHW, highest_BDH, sum_BDH = run(q_BHC, k_pages_PSGC, v_pages_PSGW, tables_BN, lengths_B)
    return _added(out_BDHW, highest_BDH, sum_BDH, sink_logits_H).astype(q_BHC.dtype)


def _added(out_BDHW, highest_BDH, sum_BDH, sink_logits_H):
    """One softmax of its parts: their sums, each over 2^highest."""
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
    return out_BHW / jnp.where(sum_BH > 0.0, sum_BH, 1.0)[..., None]  # 0: an idle place


def _kernel(
    q_BHC,
    k_PSGC,
    v_PSGW,
    tables_BN,
    lengths_B,
    out_BDHW,
    highest_BDH,
    sum_BDH,
    *,
    window_size,
    num_sinks,
):
    _, size, kv_heads, width = v_PSGW.shape
    in_group, parts = q_BHC.shape[1] // kv_heads, out_BDHW.shape[1]
    rest, part = divide(pl.program_id(0), parts)
    batch, kv_head = divide(rest, kv_heads)
    rows = _wide(in_group)
    heads, is_head_R = pl.ds(kv_head * in_group, rows), edge(0, rows, in_group)
    q_RC = _read(q_BHC, (batch, heads), rows, is_head_R)
    length = lengths_B[batch]
    sink_pages, first_page, count = _pages(length, size, window_size, num_sinks)
    per_part, _ = divide(count + parts - 1, parts)

    def step(i, carry):
        highest_R, sum_R, out_RW = carry
        page = jnp.where(i < sink_pages, i, first_page + i - sink_pages)
        at = (tables_BN[batch, page], pl.ds(0, size), kv_head)
        position_S = page * size + span(0, size)
        is_seen_S = visible(length - 1, position_S, window_size=window_size, num_sinks=num_sinks)
        scores_RS = dot(q_RC, _read(k_PSGC, at, size).T) * (LOG2_E / math.sqrt(q_BHC.shape[2]))
        is_seen_RS = jnp.broadcast_to(is_seen_S[None], scores_RS.shape)
        scores_RS = jnp.where(is_seen_RS, scores_RS, -jnp.inf)
        new_R = jnp.maximum(highest_R, scores_RS.max(axis=1))
        shrink_R, weights_RS = jnp.exp2(highest_R - new_R), jnp.exp2(scores_RS - new_R[:, None])
        v_SW = _read(v_PSGW, at, size, is_seen_S)
        out_RW = out_RW * shrink_R[:, None] + dot(weights_RS.astype(v_SW.dtype), v_SW)
        return new_R, sum_R * shrink_R + weights_RS.sum(axis=1), out_RW

    highest_R, sum_R = (jnp.full((rows,), x, jnp.float32) for x in (MASKED, 0.0))
    carry = (highest_R, sum_R, jnp.zeros((rows, _wide(width)), jnp.float32))
    begin, end = part * per_part, jnp.minimum((part + 1) * per_part, count)
    highest_R, sum_R, out_RW = lax.fori_loop(begin, end, step, carry)
    store(highest_BDH.at[batch, part, heads], highest_R, is_head_R)
    store(sum_BDH.at[batch, part, heads], sum_R, is_head_R)
    mask_RW = mask_of(out_RW.shape, is_head_R, edge(0, _wide(width), width))
    store(out_BDHW.at[batch, part, heads, pl.ds(0, _wide(width))], out_RW, mask_RW)


def _pages(length, size, window_size, num_sinks):
    """Pages that are seen: how many with sinks before the window's, the window's first, all."""
    end, _ = divide(length + size - 1, size)
    if window_size is None:
        return jnp.int32(0), jnp.int32(0), end
    first, _ = divide(jnp.maximum(length - window_size, 0), size)
    sinks = jnp.minimum(-(-num_sinks // size), first)
    return sinks, first, end - first + sinks


def _read(ref, at, rows, is_row=None):
    """Rows of the last dim at a place; channels in a power of two from 16 on, with zeros."""
    width = ref.shape[-1]
    mask = mask_of((rows, _wide(width)), is_row, edge(0, _wide(width), width))
    return load(ref.at[(*at, pl.ds(0, _wide(width)))], mask)


def _wide(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
