"""Which keys a query of latent attention sees (DeepSeek-V3.2's sparse attention, 2025).

A small attention of its own scores the keys before a query,

    I_ls = sum over h of w_lh * relu(q_lh . k_s / sqrt(C)) / sqrt(H)

and the query sees those with the best top_k scores. One key k per token serves all heads and is
cached. The published code also turns q and k by a Hadamard matrix, which no product of the two
shows, and rounds them to fp8; neither is done here.

B batch, L queries, S keys, D d_model, Q query_rank, H the indexer's heads, C its head_dim.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import LatentAttentionConfig
from model.layers import LayerNorm, rope, weight

KEY_NORM_EPS = 1e-6


class Index(NamedTuple):
    """What the tokens ask and what they offer."""

    q_BLHC: jax.Array
    k_BLC: jax.Array
    weights_BLH: jax.Array
    """float32, how much each head counts, 1 / sqrt(H C) in it."""


class Indexer(nn.Module):
    """Queries from the latent that the attention's own queries come from, keys from the token.

    The first rope_head_dim entries of both are turned by the attention's frequencies.
    """

    attention: LatentAttentionConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, h_BLQ: jax.Array, positions_BL: jax.Array) -> Index:
        c, d_model, dtype = self.attention.indexer, x_BLD.shape[-1], x_BLD.dtype
        assert c is not None
        q_shape, query_rank = (c.num_heads, c.head_dim), h_BLQ.shape[-1]
        w_q_QHC = weight(
            self, "q", (query_rank, *q_shape), ("embed", "heads", "head_dim"), query_rank**-0.5
        )
        w_k_DC = weight(self, "k", (d_model, c.head_dim), ("embed", "head_dim"), d_model**-0.5)
        w_DH = weight(self, "weights", (d_model, c.num_heads), ("embed", "heads"), d_model**-0.5)
        q_BLHC = jnp.einsum("BLQ,QHC->BLHC", h_BLQ, w_q_QHC.astype(dtype))
        k_BLC = jnp.einsum("BLD,DC->BLC", x_BLD, w_k_DC.astype(dtype))
        k_BLC = LayerNorm(KEY_NORM_EPS, name="k_norm")(k_BLC)
        weights_BLH = jnp.einsum("BLD,DH->BLH", x_BLD, w_DH.astype(dtype)).astype(jnp.float32)
        return Index(
            self._turned(q_BLHC, positions_BL),
            self._turned(k_BLC[:, :, None], positions_BL)[:, :, 0],
            weights_BLH * (c.num_heads * c.head_dim) ** -0.5,
        )

    def _turned(self, x_BLHC: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.attention
        with_BLHP, without_BLHN = jnp.split(x_BLHC, [c.rope_head_dim], axis=-1)
        with_BLHP = rope(with_BLHP, positions_BL, c.rope_base, c.rope_scaling)
        return jnp.concatenate([with_BLHP, without_BLHN], axis=-1)


def chosen_keys(index: Index, k_BSC: jax.Array, visible_BLS: jax.Array, top_k: int) -> jax.Array:
    """The visible keys with each query's best top_k scores, bool [B, L, S]; all of them where there
    are no more. Of equal scores the first keys are chosen.

    Scores are float32 and take [B, L, H, S] of memory: read long texts in pieces.
    """
    if k_BSC.shape[1] <= top_k:
        return visible_BLS
    products_BLHS = jnp.einsum(
        "BLHC,BSC->BLHS", index.q_BLHC, k_BSC, preferred_element_type=jnp.float32
    )
    scores_BLS = jnp.einsum("BLHS,BLH->BLS", jax.nn.relu(products_BLHS), index.weights_BLH)
    scores_BLS = jnp.where(visible_BLS, scores_BLS, -jnp.inf)
    least_BL1 = jax.lax.top_k(scores_BLS, top_k)[0][:, :, -1:]
    is_above_BLS, is_equal_BLS = scores_BLS > least_BL1, scores_BLS == least_BL1
    room_BL1 = top_k - is_above_BLS.sum(axis=-1, keepdims=True)
    is_first_BLS = jnp.cumsum(is_equal_BLS, axis=-1) <= room_BL1
    return visible_BLS & (is_above_BLS | (is_equal_BLS & is_first_BLS))
