"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).

One vector per token, c = norm(x W_down), holds the keys and values of all heads; a rotary key of
its own, shared by the heads, carries the position. Training and scoring make every head's keys and
values from c. With a cache, the up-projections are absorbed into the query and the result instead,
so that attention runs over the cached (c, rotary key) as if over one wide key/value head:

    q_nope . (c W_uk) = (q_nope W_uk^T) . c        (sum p c) W_uv = sum p (c W_uv)

RoPE stands between query and key and can't be absorbed: that is why its part is separate.

B batch, L length, S slots, D d_model, H heads, N nope_head_dim, P rope_head_dim, W value_head_dim,
Q query_rank, R latent_rank.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import LatentAttentionConfig
from configs.base import ExecutionConfig
from kernels.window_attention import masked_attention, visible
from model.attention.windowed import sharded_window_attention
from model.cache import LayerCache, append
from model.layers import RMSNorm, rope, weight


class LatentAttention(nn.Module):
    """Attention over the tokens of the same document, or over a cache and the new tokens."""

    config: LatentAttentionConfig
    execution: ExecutionConfig
    norm_eps: float
    out_stddev: float

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        heads, rank = c.num_heads, c.latent_rank
        up_shape = (rank, heads, c.nope_head_dim + c.value_head_dim)
        w_up_RHC = weight(self, "kv_up", up_shape, ("embed", "heads", "head_dim"), rank**-0.5)
        w_o_HWD = weight(
            self,
            "o",
            (heads, c.value_head_dim, d_model),
            ("heads", "head_dim", "embed"),
            self.out_stddev,
        )
        q_nope_BLHN, q_rope_BLHP = self._queries(x_BLD, positions_BL)
        latent_BLR, k_rope_BL1P = self._latent(x_BLD, positions_BL)
        w_up_RHC = w_up_RHC.astype(dtype)
        w_uk_RHN, w_uv_RHW = jnp.split(w_up_RHC, [c.nope_head_dim], axis=-1)
        if cache is None:
            k_nope_BLHN = jnp.einsum("BLR,RHN->BLHN", latent_BLR, w_uk_RHN)
            k_rope_BLHP = jnp.broadcast_to(k_rope_BL1P, q_rope_BLHP.shape)
            out_BLHW = sharded_window_attention(
                jnp.concatenate([q_nope_BLHN, q_rope_BLHP], axis=-1),
                jnp.concatenate([k_nope_BLHN, k_rope_BLHP], axis=-1),
                jnp.einsum("BLR,RHW->BLHW", latent_BLR, w_uv_RHW),
                positions_BL,
                segments_BL,
                implementation=self.execution.window_attention,
            )
        else:
            key_BL1C = jnp.concatenate([latent_BLR[:, :, None], k_rope_BL1P], axis=-1)
            cache, seen = append(cache, key_BL1C, key_BL1C[..., :0], positions_BL, 0)
            q_latent_BLHR = jnp.einsum("BLHN,RHN->BLHR", q_nope_BLHN, w_uk_RHN)
            q_BLHC = jnp.concatenate([q_latent_BLHR, q_rope_BLHP], axis=-1)
            # Scores are divided by the root of this wide query's width, not of the head's.
            q_BLHC *= (q_BLHC.shape[-1] / c.query_head_dim) ** 0.5
            mask_BLS = visible(
                positions_BL[:, :, None],
                seen.positions_BS[:, None, :],
                window_size=None,
                num_sinks=0,
            )
            summed_BLHR = masked_attention(q_BLHC, seen.k_BSGC, seen.k_BSGC[..., :rank], mask_BLS)
            out_BLHW = jnp.einsum("BLHR,RHW->BLHW", summed_BLHR, w_uv_RHW)
        return jnp.einsum("BLHW,HWD->BLD", out_BLHW, w_o_HWD.astype(dtype)), cache

    def _queries(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries without and with position, [B, L, H, N] and [B, L, H, P]."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        h_BLQ, width = x_BLD, d_model
        if c.query_rank is not None:
            w_DQ = weight(
                self, "q_down", (d_model, c.query_rank), ("embed", "latent"), d_model**-0.5
            )
            h_BLQ = jnp.einsum("BLD,DQ->BLQ", x_BLD, w_DQ.astype(dtype))
            h_BLQ, width = RMSNorm(self.norm_eps, name="q_norm")(h_BLQ), c.query_rank
        shape = (width, c.num_heads, c.query_head_dim)
        w_QHC = weight(self, "q", shape, ("embed", "heads", "head_dim"), width**-0.5)
        q_BLHC = jnp.einsum("BLQ,QHC->BLHC", h_BLQ, w_QHC.astype(dtype))
        if c.yarn is not None:
            q_BLHC *= c.yarn.logit_scale
        q_nope_BLHN, q_rope_BLHP = jnp.split(q_BLHC, [c.nope_head_dim], axis=-1)
        return q_nope_BLHN, rope(q_rope_BLHP, positions_BL, c.rope_base, c.yarn)

    def _latent(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is cached: the normed latent [B, L, R] and the turned rotary key [B, L, 1, P]."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        shape = (d_model, c.latent_rank + c.rope_head_dim)
        w_DC = weight(self, "kv_down", shape, ("embed", "latent"), d_model**-0.5)
        down_BLC = jnp.einsum("BLD,DC->BLC", x_BLD, w_DC.astype(dtype))
        latent_BLR = RMSNorm(self.norm_eps, name="kv_norm")(down_BLC[..., : c.latent_rank])
        k_rope_BL1P = down_BLC[..., None, c.latent_rank :]
        return latent_BLR, rope(k_rope_BL1P, positions_BL, c.rope_base, c.yarn)
