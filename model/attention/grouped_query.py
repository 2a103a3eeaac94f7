"""Grouped-query attention with RoPE, a sliding window, sink tokens and learned sink logits; biases,
normed and bounded queries and keys where public models have them.

B batch, L length, S keys, D d_model, H query heads, G key/value heads, C head_dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import AttentionConfig
from configs.base import ExecutionConfig
from kernels.window_attention import masked_attention, visible
from model.attention.windowed import sharded_window_attention
from model.cache import LayerCache, append
from model.layers import RMSNorm, rope, weight, zero_weight

QUERY_AXES, KEY_AXES = ("heads", "head_dim"), ("kv_heads", "head_dim")


class GroupedQueryAttention(nn.Module):
    """Attention over the tokens of the same document, or over a cache and the new tokens."""

    config: AttentionConfig
    execution: ExecutionConfig
    norm_eps: float
    out_stddev: float
    out_features: int | None = None
    """Width of the result; None is d_model."""
    gaps: bool = False
    """Whether positions may skip some inside a document: see kernels/window_attention."""

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c, d_model = self.config, x_BLD.shape[-1]
        q_BLHC, k_BLGC, v_BLGC = self._projected(x_BLD)
        out_axis = None if self.out_features else "embed"
        out_shape = (c.num_heads, c.head_dim, self.out_features or d_model)
        w_o_HCD = weight(self, "o", out_shape, (*QUERY_AXES, out_axis), self.out_stddev)
        q_BLHC, k_BLGC, v_BLGC = self._normed_and_bounded(q_BLHC, k_BLGC, v_BLGC)
        q_BLHC = rope(q_BLHC, positions_BL, c.rope_base, c.rope_scaling)
        k_BLGC = rope(k_BLGC, positions_BL, c.rope_base, c.rope_scaling)
        if c.rope_scaling is not None:
            q_BLHC *= c.rope_scaling.logit_scale
        sink_logits_H = None
        if c.sink_logits:  # they start as if one more key had the score 0
            sink_logits_H = zero_weight(self, "sink_logits", (c.num_heads,), ("heads",))
        out_BLHC, cache = self._attended(
            q_BLHC, k_BLGC, v_BLGC, positions_BL, segments_BL, cache, sink_logits_H
        )
        out_BLD = jnp.einsum("BLHC,HCD->BLD", out_BLHC, w_o_HCD.astype(x_BLD.dtype))
        if c.bias:
            o_bias_D = zero_weight(self, "o_bias", out_shape[2:], (out_axis,))
            out_BLD += o_bias_D.astype(out_BLD.dtype)[None, None]
        return out_BLD, cache

    def _projected(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, H, C], keys and values [B, L, G, C], biases added."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        q_shape, kv_shape = (c.num_heads, c.head_dim), (2, c.num_kv_heads, c.head_dim)
        kv_axes = (None, *KEY_AXES)
        w_q_DHC = weight(self, "q", (d_model, *q_shape), ("embed", *QUERY_AXES), d_model**-0.5)
        w_kv_D2GC = weight(self, "kv", (d_model, *kv_shape), ("embed", *kv_axes), d_model**-0.5)
        q_BLHC = jnp.einsum("BLD,DHC->BLHC", x_BLD, w_q_DHC.astype(dtype))
        kv_BL2GC = jnp.einsum("BLD,DiGC->BLiGC", x_BLD, w_kv_D2GC.astype(dtype))
        if c.bias:
            q_BLHC += zero_weight(self, "q_bias", q_shape, QUERY_AXES).astype(dtype)[None, None]
            bias_2GC = zero_weight(self, "kv_bias", kv_shape, kv_axes).astype(dtype)
            kv_BL2GC += bias_2GC[None, None]
        return q_BLHC, kv_BL2GC[:, :, 0], kv_BL2GC[:, :, 1]

    def _normed_and_bounded(
        self, q_BLHC: jax.Array, k_BLGC: jax.Array, v_BLGC: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        if c.qk_norm is not None:
            kept = 1 if c.qk_norm == "head" else 2
            q_BLHC = RMSNorm(self.norm_eps, QUERY_AXES[-kept:], name="q_norm")(q_BLHC)
            k_BLGC = RMSNorm(self.norm_eps, KEY_AXES[-kept:], name="k_norm")(k_BLGC)
        if c.clip_qkv is None:
            return q_BLHC, k_BLGC, v_BLGC
        q_BLHC, k_BLGC, v_BLGC = (
            jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in (q_BLHC, k_BLGC, v_BLGC)
        )
        return q_BLHC, k_BLGC, v_BLGC

    def _attended(
        self,
        q_BLHC: jax.Array,
        k_BLGC: jax.Array,
        v_BLGC: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | None,
        sink_logits_H: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Each head's sum of values, [B, L, H, C], and the cache with the tokens."""
        c = self.config
        reach = {"window_size": c.window_size, "num_sink_tokens": c.num_sink_tokens}
        if cache is None or cache.is_empty:
            out_BLHC = sharded_window_attention(
                q_BLHC,
                k_BLGC,
                v_BLGC,
                positions_BL,
                segments_BL,
                sink_logits_H=sink_logits_H,
                gaps=self.gaps,
                implementation=self.execution.window_attention,
                **reach,
            )
            if cache is not None:
                cache, _ = append(cache, k_BLGC, v_BLGC, positions_BL, c.num_sink_tokens)
            return out_BLHC, cache
        cache, seen = append(cache, k_BLGC, v_BLGC, positions_BL, c.num_sink_tokens)
        mask_BLS = visible(positions_BL[:, :, None], seen.positions_BS[:, None, :], **reach)
        return masked_attention(q_BLHC, seen.k_BSGC, seen.v_BSGC, mask_BLS, sink_logits_H), cache
