"""The signatures of the two sparse attentions, their checks, and the choice of an implementation.

Both do O(n (w + log n)) work for n rows and a window of w, beside blocks of rows.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values (C in most models).
"""

from typing import Literal

import jax

from kernels.sparse_attention import reference, xla

Implementation = Literal["auto", "reference", "xla"]
IMPLEMENTATIONS = {"auto": xla, "reference": reference, "xla": xla}


def power_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int,
    num_sink_tokens: int,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns causal attention over a window, powers of two and sinks, [B, L, H, W].

    A row at position i sees those of its segment at i - j for 0 <= j < window_size, at i - 2^p for
    every p >= 0, and at positions below num_sink_tokens (LogSparse, Li et al. 2019, with a window
    and StreamingLLM's sinks): see `num_edges`. Head h uses key/value head h // (H / G). Scores are
    divided by sqrt(C).

    Args:
      q_BLHC: float [B, L, H, C].
      k_BLGC: float [B, L, G, C]; H must be a multiple of G.
      v_BLGW: float [B, L, G, W].
      positions_BL: int32, the row's position in its segment, rising by one inside it; a negative
        position is padding: no row sees it, and its own result is unspecified but finite.
      segments_BL: int32, equal for the rows of one document, which must be contiguous.
      implementation: "reference" makes the whole [L, L] score matrix; "xla" works on blocks of rows
        and shifted keys; "auto" takes "xla".
    Raises:
      ValueError: shapes that do not fit, or no window.
    Numerics: softmax in float32; float32 within 1e-5 of the reference.
    """
    _check(q_BLHC, k_BLGC, v_BLGW, window_size)
    return IMPLEMENTATIONS[implementation].power_attention(
        q_BLHC,
        k_BLGC,
        v_BLGW,
        positions_BL,
        segments_BL,
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
    )


def summary_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    pool_GC: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int,
    block_size: int,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns causal attention over the blocks of a window and summaries before, [B, L, H, W].

    Rows are cut into blocks of block_size, aligned to the first row. A row sees the rows of its own
    block up to itself and those of the ceil((window_size - 1) / block_size) blocks before it, one
    by one. The c whole blocks before those are seen as one bucket for each bit of c, the largest
    first (a Fenwick tree; Guo et al. 2025): 13 blocks are buckets of 8, 4 and 1. A bucket is one
    key and one value, the sums of its rows' weighted by softmax_bucket(pool_g . k), and its score
    gets log(rows of the bucket), so that a bucket of equal keys counts like its rows.

    A bucket that begins before the row's own document is not seen at all: in packed rows, what such
    a bucket holds of the document is lost to the rows beyond their window.

    Args:
      pool_GC: float32 [G, C], the pooling vectors.
      Others as in `power_attention`.
    Raises:
      ValueError: shapes that do not fit, or no window.
    Numerics: softmax and pooling in float32; float32 within 1e-5 of the reference.
    """
    _check(q_BLHC, k_BLGC, v_BLGW, window_size)
    if pool_GC.shape != k_BLGC.shape[2:]:
        raise ValueError(f"pool {pool_GC.shape} must be [G, C], {k_BLGC.shape[2:]}")
    return IMPLEMENTATIONS[implementation].summary_attention(
        q_BLHC,
        k_BLGC,
        v_BLGW,
        pool_GC,
        positions_BL,
        segments_BL,
        window_size=window_size,
        block_size=block_size,
    )


def _check(q_BLHC: jax.Array, k_BLGC: jax.Array, v_BLGW: jax.Array, window_size: int) -> None:
    batch, length, heads, width = q_BLHC.shape
    kv_heads = k_BLGC.shape[2]
    fits = k_BLGC.shape == (batch, length, kv_heads, width)
    if not fits or v_BLGW.shape[:3] != (batch, length, kv_heads):
        raise ValueError(
            f"q {q_BLHC.shape}, k {k_BLGC.shape} and v {v_BLGW.shape} must be [B, L, H, C], "
            "[B, L, G, C] and [B, L, G, W]"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key/value heads")
    if window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1: a row sees itself")
