"""window_attention by blocks of queries, each against the keys it can see.

Rows after a block are invisible to it, and so are rows a window or more before it, except sinks:
those are gathered for each query from the start of its own segment. The blocks are unrolled with
static key ranges, at most MAX_BLOCKS of them, so short sequences skip nearly half of the scores and
windowed ones do work in proportion to the window.

B batch, L rows, M rows of a block, S keys of a block, N sinks, G key/value heads, R query heads per
key/value head, C head_dim, W width of values.
"""

import jax
import jax.numpy as jnp

from kernels.window_attention.reference import MASKED, capped, softmax, visible

MIN_BLOCK, MAX_BLOCKS = 64, 8


def block_rows(length: int) -> int:
    """Queries of a block: at least MIN_BLOCK, and at most MAX_BLOCKS blocks."""
    per_block = -(-length // MAX_BLOCKS)
    return min(length, -(-per_block // MIN_BLOCK) * MIN_BLOCK)


def window_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None,
    gaps: bool,
    score_cap: float | None = None,
) -> jax.Array:
    """Returns the attention of each row over the visible rows of its segment, [B, L, H, W]."""
    batch, length, heads, width = q_BLHC.shape
    kv_heads, block = k_BLGC.shape[2], block_rows(length)
    q_BLGRC = (q_BLHC * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
    q_BGRLC = q_BLGRC.transpose(0, 2, 3, 1, 4)
    k_BGLC, v_BGLW = k_BLGC.transpose(0, 2, 1, 3), v_BLGW.transpose(0, 2, 1, 3)

    blocks = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first_key = 0 if window_size is None else max(0, begin - window_size + 1)
        rows, keys = slice(begin, end), slice(first_key, end)
        mask_BMS = visible(
            positions_BL[:, rows, None],
            positions_BL[:, None, keys],
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
        )
        mask_BMS &= segments_BL[:, rows, None] == segments_BL[:, None, keys]
        q_BGRMC = q_BGRLC[:, :, :, rows]
        scores_BGRMS = _masked_scores(
            jnp.einsum(
                "BGRMC,BGSC->BGRMS",
                q_BGRMC,
                k_BGLC[:, :, keys],
                preferred_element_type=jnp.float32,
            ),
            mask_BMS,
            score_cap,
        )
        if num_sink_tokens and first_key > 0:
            if gaps:
                starts_BM = _segment_starts(segments_BL)[:, rows]
                found = _sinks_among(positions_BL, starts_BM, first_key, num_sink_tokens)
            else:
                found = _sinks(positions_BL[:, rows], begin, first_key, num_sink_tokens)
            sink_rows_BMN, mask_BMN = found
            out_BGRMW = _attend_with_sinks(
                q_BGRMC,
                scores_BGRMS,
                v_BGLW[:, :, keys],
                k_BGLC,
                v_BGLW,
                sink_rows_BMN,
                mask_BMN,
                sink_logits_H,
                score_cap,
            )
        else:
            weights_BGRMS = softmax(scores_BGRMS, sink_logits_H).astype(v_BLGW.dtype)
            out_BGRMW = jnp.einsum("BGRMS,BGSW->BGRMW", weights_BGRMS, v_BGLW[:, :, keys])
        blocks.append(out_BGRMW)
    out_BGRLW = jnp.concatenate(blocks, axis=3)
    return out_BGRLW.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v_BGLW.shape[-1])


def _masked_scores(
    scores_BGRMS: jax.Array, mask_BMS: jax.Array, score_cap: float | None
) -> jax.Array:
    return jnp.where(mask_BMS[:, None, None], capped(scores_BGRMS, score_cap), MASKED)


def _sinks(
    positions_BM: jax.Array, begin: int, first_key: int, num_sink_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Rows of each query's sinks, and which of them lie before the block's own keys."""
    starts_BM = begin + jnp.arange(positions_BM.shape[1])[None] - positions_BM
    sink_rows_BMN = starts_BM[:, :, None] + jnp.arange(num_sink_tokens)[None, None]
    is_before_BMN = (sink_rows_BMN < first_key) & (positions_BM >= 0)[:, :, None]
    return jnp.clip(sink_rows_BMN, 0, first_key - 1), is_before_BMN


def _segment_starts(segments_BL: jax.Array) -> jax.Array:
    """The first row of each row's segment, int32 [B, L]."""
    is_start_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)))
    row_BL = jax.lax.broadcasted_iota(jnp.int32, segments_BL.shape, 1)
    return jax.lax.cummax(jnp.where(is_start_BL, row_BL, 0), axis=1)


def _sinks_among(
    positions_BL: jax.Array, starts_BM: jax.Array, first_key: int, num_sink_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """As `_sinks` where positions have gaps: which of the segment's first rows are sinks is asked
    of the rows themselves. They lie before the query, so they are of its segment.
    """
    rows_BMN = starts_BM[:, :, None] + jnp.arange(num_sink_tokens)[None, None]
    clipped_BMN = jnp.clip(rows_BMN, 0, first_key - 1)
    at_BMN = jax.vmap(lambda positions_L, rows_MN: positions_L[rows_MN])(positions_BL, clipped_BMN)
    return clipped_BMN, (rows_BMN < first_key) & (at_BMN >= 0) & (at_BMN < num_sink_tokens)


def _attend_with_sinks(
    q_BGRMC,
    scores_BGRMS,
    v_BGSW,
    k_BGLC,
    v_BGLW,
    sink_rows_BMN,
    mask_BMN,
    sink_logits_H,
    score_cap,
) -> jax.Array:
    """One softmax over the block's keys and each query's own sinks."""

    def gather(x_BGLC):
        return jax.vmap(lambda x_GLC, rows_MN: x_GLC[:, rows_MN])(x_BGLC, sink_rows_BMN)

    sink_scores_BGRMN = _masked_scores(
        jnp.einsum(
            "BGRMC,BGMNC->BGRMN", q_BGRMC, gather(k_BGLC), preferred_element_type=jnp.float32
        ),
        mask_BMN,
        score_cap,
    )
    scores = jnp.concatenate([scores_BGRMS, sink_scores_BGRMN], axis=-1)
    weights = softmax(scores, sink_logits_H).astype(v_BGSW.dtype)
    num_keys = v_BGSW.shape[2]
    out_BGRMW = jnp.einsum("BGRMS,BGSW->BGRMW", weights[..., :num_keys], v_BGSW)
    return out_BGRMW + jnp.einsum("BGRMN,BGMNW->BGRMW", weights[..., num_keys:], gather(v_BGLW))
