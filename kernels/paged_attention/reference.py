"""The definition of paged attention: the pages of a sequence side by side, then dense attention.

B sequences, H query heads, G key/value heads, C head_dim or latent_rank, E rope_head_dim, W width
of values, P pages of S positions, N pages of a sequence, L = N * S positions.
"""

import jax
import jax.numpy as jnp

from kernels.window_attention.reference import MASKED, masked_attention, visible


def paged_attention(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    k_scales_PSG: jax.Array | None = None,
    v_scales_PSG: jax.Array | None = None,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(C)) v over the visible positions, [B, H, W]."""
    num_positions = tables_BN.shape[1] * k_pages_PSGC.shape[1]
    is_seen_BL = _seen(lengths_B, num_positions, window_size, num_sink_tokens)
    k_BLGC = _side_by_side(k_pages_PSGC, k_scales_PSG, tables_BN).astype(q_BHC.dtype)
    v_BLGW = _side_by_side(v_pages_PSGW, v_scales_PSG, tables_BN).astype(q_BHC.dtype)
    # Pages that no sequence has written may hold anything: 0 * NaN would be NaN.
    v_BLGW = jnp.where(is_seen_BL[..., None, None], v_BLGW, 0)
    mask_B1L = is_seen_BL[:, None]
    out_B1HW = masked_attention(q_BHC[:, None], k_BLGC, v_BLGW, mask_B1L, sink_logits_H)
    return jnp.where((lengths_B > 0)[:, None, None], out_B1HW[:, 0], 0)


def paged_latent_attention(
    q_latent_BHR: jax.Array,
    q_rope_BHP: jax.Array,
    latent_pages_ZSR: jax.Array,
    rope_pages_ZSP: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    latent_scales_ZS: jax.Array | None = None,
    scale: float,
    window_size: int | None,
    num_sink_tokens: int,
) -> jax.Array:
    """Returns softmax(scale * (q_latent c^T + q_rope k_rope^T)) c, [B, H, C]."""
    num_positions = tables_BN.shape[1] * latent_pages_ZSR.shape[1]
    is_seen_B1L = _seen(lengths_B, num_positions, window_size, num_sink_tokens)[:, None]
    latent_BLR = _side_by_side(latent_pages_ZSR, latent_scales_ZS, tables_BN)
    latent_BLR = jnp.where(is_seen_B1L[:, 0, :, None], latent_BLR.astype(q_latent_BHR.dtype), 0)
    rope_BLP = _side_by_side(rope_pages_ZSP, None, tables_BN).astype(q_rope_BHP.dtype)
    in_float32 = {"preferred_element_type": jnp.float32}
    scores_BHL = jnp.einsum("BHR,BLR->BHL", q_latent_BHR, latent_BLR, **in_float32)
    scores_BHL += jnp.einsum("BHP,BLP->BHL", q_rope_BHP, rope_BLP, **in_float32)
    scores_BHL = jnp.where(is_seen_B1L, scores_BHL * scale, MASKED)
    weights_BHL = jax.nn.softmax(scores_BHL, axis=-1).astype(latent_BLR.dtype)
    out_BHR = jnp.einsum("BHL,BLR->BHR", weights_BHL, latent_BLR)
    return jnp.where((lengths_B > 0)[:, None, None], out_BHR, 0)


def _seen(
    lengths_B: jax.Array, num_positions: int, window_size: int | None, num_sink_tokens: int
) -> jax.Array:
    """Which positions the last one of each sequence sees, bool [B, L]."""
    position_L = jnp.arange(num_positions, dtype=jnp.int32)
    reach = {"window_size": window_size, "num_sink_tokens": num_sink_tokens}
    return visible(lengths_B[:, None] - 1, position_L[None], **reach)


def _side_by_side(pages: jax.Array, scales: jax.Array | None, tables_BN: jax.Array) -> jax.Array:
    """The positions of each sequence in its order, [B, L, ...]; float32 where there are scales."""
    positions = pages[tables_BN]
    if scales is not None:
        positions = positions.astype(jnp.float32) * scales[tables_BN][..., None].astype(jnp.float32)
    batch, count, size, *rest = positions.shape
    return positions.reshape(batch, count * size, *rest)
