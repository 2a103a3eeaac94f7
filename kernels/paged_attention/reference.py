"""The definition of paged_attention: the pages of a sequence side by side, then dense attention.

B sequences, H query heads, G key/value heads, C head_dim, W width of values, P pages of S
positions, N pages of a sequence, L = N * S positions.
"""

import jax
import jax.numpy as jnp

from kernels.window_attention.reference import masked_attention, visible


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
    num_sinks: int,
    sink_logits_H: jax.Array | None,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(C)) v over the visible positions, [B, H, W]."""
    position_L = jnp.arange(tables_BN.shape[1] * k_pages_PSGC.shape[1], dtype=jnp.int32)
    last_B1 = lengths_B[:, None] - 1
    reach = {"window_size": window_size, "num_sinks": num_sinks}
    mask_B1L = visible(last_B1, position_L[None], **reach)[:, None]
    k_BLGC = _side_by_side(k_pages_PSGC, k_scales_PSG, tables_BN).astype(q_BHC.dtype)
    v_BLGW = _side_by_side(v_pages_PSGW, v_scales_PSG, tables_BN).astype(q_BHC.dtype)
    # Pages that no sequence has written may hold anything: 0 * NaN would be NaN.
    is_seen_BL11 = mask_B1L[:, 0, :, None, None]
    v_BLGW = jnp.where(is_seen_BL11, v_BLGW, 0)
    out_B1HW = masked_attention(q_BHC[:, None], k_BLGC, v_BLGW, mask_B1L, sink_logits_H)
    return jnp.where((last_B1 >= 0)[:, :, None], out_B1HW[:, 0], 0)


def _side_by_side(pages: jax.Array, scales: jax.Array | None, tables_BN: jax.Array) -> jax.Array:
    """The positions of each sequence in its order, [B, L, ...]; float32 where there are scales."""
    positions = pages[tables_BN]
    if scales is not None:
        positions = positions.astype(jnp.float32) * scales[tables_BN][..., None].astype(jnp.float32)
    batch, count, size, *rest = positions.shape
    return positions.reshape(batch, count * size, *rest)
