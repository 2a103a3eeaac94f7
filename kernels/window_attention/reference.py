"""The definition of window_attention: one dense mask, one softmax.

B batch, L rows (queries), S keys, G key/value heads, R query heads per key/value head, H = G * R,
C head_dim, W width of values.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query that sees nothing gives a finite value instead of NaN


def visible(
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    window_size: int | None,
    num_sink_tokens: int,
    chunk_size: int | None = None,
) -> jax.Array:
    """Whether a query at position i sees a key at position j: 0 <= i - j < w, or
    j < num_sink_tokens <= i; with a chunk size, only of its own chunk.

    The two arrays broadcast against each other; a key at a negative position is an empty slot.
    """
    distance = q_positions - k_positions
    is_visible = (distance >= 0) & (k_positions >= 0)
    if window_size is not None:
        is_visible &= (distance < window_size) | (k_positions < num_sink_tokens)
    if chunk_size is not None:
        is_visible &= q_positions // chunk_size == k_positions // chunk_size
    return is_visible


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(scores / cap) (Gemma 2, 2024), float32; scores as they are without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


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
    score_cap: float | None = None,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(C)) v over the visible keys of the segment, [B, L, H, W]."""
    mask_BLS = visible(
        positions_BL[:, :, None],
        positions_BL[:, None, :],
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
    )
    mask_BLS &= segments_BL[:, :, None] == segments_BL[:, None, :]
    return masked_attention(q_BLHC, k_BLGC, v_BLGW, mask_BLS, sink_logits_H, score_cap)


def masked_attention(
    q_BLHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGW: jax.Array,
    mask_BLS: jax.Array,
    sink_logits_H: jax.Array | None = None,
    score_cap: float | None = None,
) -> jax.Array:
    """Attention under an explicit mask; scores and softmax in float32, the result in q's dtype."""
    batch, length, heads, width = q_BLHC.shape
    kv_heads = k_BSGC.shape[2]
    q_BLGRC = (q_BLHC * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BGRLS = jnp.einsum(
        "BLGRC,BSGC->BGRLS", q_BLGRC, k_BSGC, preferred_element_type=jnp.float32
    )
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], capped(scores_BGRLS, score_cap), MASKED)
    weights_BGRLS = softmax(scores_BGRLS, sink_logits_H).astype(v_BSGW.dtype)
    out_BLGRW = jnp.einsum("BGRLS,BSGW->BLGRW", weights_BGRLS, v_BSGW)
    return out_BLGRW.reshape(batch, length, heads, v_BSGW.shape[-1])


def softmax(scores_BGRLS: jax.Array, sink_logits_H: jax.Array | None) -> jax.Array:
    """exp(a_j) / (exp(b_h) + sum_j exp(a_j)) over the last dim (gpt-oss, 2025): what the sink
    takes goes to no value. Without sinks, the ordinary softmax.

    Args:
      sink_logits_H: float32, b_h of each query head; float32 scores.
    """
    if sink_logits_H is None:
        return jax.nn.softmax(scores_BGRLS, axis=-1)
    sink_BGRLS = sink_logits_H.reshape(1, *scores_BGRLS.shape[1:3], 1, 1)
    highest = jnp.maximum(scores_BGRLS.max(axis=-1, keepdims=True), sink_BGRLS)
    highest = jax.lax.stop_gradient(highest)
    exp_BGRLS = jnp.exp(scores_BGRLS - highest)
    return exp_BGRLS / (jnp.exp(sink_BGRLS - highest) + exp_BGRLS.sum(axis=-1, keepdims=True))
