"""Grouped-query attention with RoPE over a window and O(log n) places before it.

Two kinds of far sight behind one config: the tokens at powers of two back and the document's first
(LogSparse, Li et al. 2019), or summaries, one learned pooling of keys and values for each of log n
dyadic buckets. kernels/sparse_attention defines both. With a cache, whose slot is the position, the
new tokens are written first and then look only at the slots and summaries they need.

B batch, L length, S slots, D d_model, H query heads, G key/value heads, C head_dim.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import LocalSparseAttentionConfig
from configs.base import ExecutionConfig
from kernels.sparse_attention import (
    cached_power_attention,
    cached_summary_attention,
    power_attention,
    rebuilt,
    summary_attention,
    updated,
)
from model.cache import LayerCache, SummaryCache, append
from model.layers import rope, weight


class LocalSparseAttention(nn.Module):
    """Attention over the tokens of the same document, or over a cache and the new tokens."""

    config: LocalSparseAttentionConfig
    execution: ExecutionConfig
    out_stddev: float

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | SummaryCache | None,
    ) -> tuple[jax.Array, LayerCache | SummaryCache | None]:
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        q_shape, kv_shape = (c.num_heads, c.head_dim), (2, c.num_kv_heads, c.head_dim)
        q_axes, kv_axes = ("heads", "head_dim"), (None, "kv_heads", "head_dim")
        w_q_DHC = weight(self, "q", (d_model, *q_shape), ("embed", *q_axes), d_model**-0.5)
        w_kv_D2GC = weight(self, "kv", (d_model, *kv_shape), ("embed", *kv_axes), d_model**-0.5)
        w_o_HCD = weight(self, "o", (*q_shape, d_model), (*q_axes, "embed"), self.out_stddev)
        q_BLHC = jnp.einsum("BLD,DHC->BLHC", x_BLD, w_q_DHC.astype(dtype))
        kv_BL2GC = jnp.einsum("BLD,DiGC->BLiGC", x_BLD, w_kv_D2GC.astype(dtype))
        q_BLHC = rope(q_BLHC, positions_BL, c.rope_base)
        k_BLGC, v_BLGC = rope(kv_BL2GC[:, :, 0], positions_BL, c.rope_base), kv_BL2GC[:, :, 1]
        attend = self._over_summaries if c.far == "summaries" else self._over_powers
        out_BLHC, cache = attend(q_BLHC, k_BLGC, v_BLGC, positions_BL, segments_BL, cache)
        return jnp.einsum("BLHC,HCD->BLD", out_BLHC, w_o_HCD.astype(dtype)), cache

    def _over_powers(
        self,
        q_BLHC: jax.Array,
        k_BLGC: jax.Array,
        v_BLGC: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | SummaryCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        reach = {"window_size": c.window_size, "num_sink_tokens": c.num_sink_tokens}
        if cache is None:
            rows = (positions_BL, segments_BL)
            chosen = self.execution.sparse_attention
            return power_attention(
                q_BLHC, k_BLGC, v_BLGC, *rows, implementation=chosen, **reach
            ), None
        assert isinstance(cache, LayerCache)
        cache, _ = append(cache, k_BLGC, v_BLGC, positions_BL, num_sink_tokens=0)
        k_BSGC, v_BSGC = (x.astype(q_BLHC.dtype) for x in (cache.k_BSGC, cache.v_BSGC))
        out_BLHC = cached_power_attention(
            q_BLHC, k_BSGC, v_BSGC, positions_BL, cache.positions_BS, **reach
        )
        return out_BLHC, cache

    def _over_summaries(
        self,
        q_BLHC: jax.Array,
        k_BLGC: jax.Array,
        v_BLGC: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: LayerCache | SummaryCache | None,
    ) -> tuple[jax.Array, SummaryCache | None]:
        c = self.config
        assert c.block_size is not None
        # All zeros pools by the mean; each head's own keys then pull its vector apart.
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("kv_heads", "head_dim"))
        pool_GC = cast(jax.Array, self.param("pool", init, k_BLGC.shape[2:], jnp.float32))
        reach = {"window_size": c.window_size, "block_size": c.block_size}
        if cache is None:
            rows = (positions_BL, segments_BL)
            chosen = self.execution.sparse_attention
            return summary_attention(
                q_BLHC, k_BLGC, v_BLGC, pool_GC, *rows, implementation=chosen, **reach
            ), None
        assert isinstance(cache, SummaryCache)
        tokens, _ = append(cache.tokens, k_BLGC, v_BLGC, positions_BL, num_sink_tokens=0)
        k_BSGC, v_BSGC = tokens.k_BSGC, tokens.v_BSGC
        if positions_BL.shape[1] == 1:
            nodes = updated(cache.nodes, k_BSGC, v_BSGC, pool_GC, positions_BL[:, 0], c.block_size)
        else:
            nodes = rebuilt(k_BSGC, v_BSGC, pool_GC, c.block_size)
        k_BSGC, v_BSGC = (x.astype(q_BLHC.dtype) for x in (k_BSGC, v_BSGC))
        out_BLHC = cached_summary_attention(
            q_BLHC, k_BSGC, v_BSGC, nodes, positions_BL, tokens.positions_BS, **reach
        )
        return out_BLHC, SummaryCache(tokens, nodes)
