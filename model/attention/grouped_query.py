"""Grouped-query attention with RoPE, a sliding window, sink tokens and learned sink logits.

B batch, L length, S keys, D d_model, H query heads, G key/value heads, C head_dim.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import AttentionConfig
from configs.base import ExecutionConfig
from kernels.window_attention import masked_attention, visible
from model.attention.windowed import sharded_window_attention
from model.cache import LayerCache, append
from model.layers import rope, weight


class GroupedQueryAttention(nn.Module):
    """Attention over the tokens of the same document, or over a cache and the new tokens."""

    config: AttentionConfig
    execution: ExecutionConfig
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
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        w_q_DHC = weight(
            self,
            "q",
            (d_model, c.num_heads, c.head_dim),
            ("embed", "heads", "head_dim"),
            d_model**-0.5,
        )
        w_kv_D2GC = weight(
            self,
            "kv",
            (d_model, 2, c.num_kv_heads, c.head_dim),
            ("embed", None, "kv_heads", "head_dim"),
            d_model**-0.5,
        )
        w_o_HCD = weight(
            self,
            "o",
            (c.num_heads, c.head_dim, self.out_features or d_model),
            ("heads", "head_dim", None if self.out_features else "embed"),
            self.out_stddev,
        )
        q_BLHC = jnp.einsum("BLD,DHC->BLHC", x_BLD, w_q_DHC.astype(dtype))
        kv_BL2GC = jnp.einsum("BLD,DiGC->BLiGC", x_BLD, w_kv_D2GC.astype(dtype))
        q_BLHC = rope(q_BLHC, positions_BL, c.rope_base, c.yarn)
        k_BLGC = rope(kv_BL2GC[:, :, 0], positions_BL, c.rope_base, c.yarn)
        if c.yarn is not None:
            q_BLHC *= c.yarn.logit_scale
        v_BLGC = kv_BL2GC[:, :, 1]
        sink_logits_H = self._sink_logits() if c.learned_sinks else None
        reach = {"window_size": c.window_size, "num_sinks": c.num_sinks}
        if cache is None:
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
        else:
            cache, seen = append(cache, k_BLGC, v_BLGC, positions_BL, c.num_sinks)
            mask_BLS = visible(positions_BL[:, :, None], seen.positions_BS[:, None, :], **reach)
            out_BLHC = masked_attention(q_BLHC, seen.k_BSGC, seen.v_BSGC, mask_BLS, sink_logits_H)
        return jnp.einsum("BLHC,HCD->BLD", out_BLHC, w_o_HCD.astype(dtype)), cache

    def _sink_logits(self) -> jax.Array:
        """float32 [H]; they start at 0, as if one more key had that score."""
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        return cast(
            jax.Array, self.param("sink_logits", init, (self.config.num_heads,), jnp.float32)
        )
