"""What a model repeats: a layer (Block), and the pattern's layers once (Period).

B batch, L length, D d_model, E experts.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import (
    Attention,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.base import ExecutionConfig
from configs.feed_forward import DenseConfig
from model.attention.grouped_query import GroupedQueryAttention
from model.attention.latent import LatentAttention
from model.attention.local_sparse import LocalSparseAttention
from model.attention.relative import RelativeAttention
from model.cache import BlockCache
from model.depth import routed
from model.layers import RMSNorm, SwiGLU, newest
from model.moe import MoE
from parallel.sharding import constrain

Preference = dict[str, jax.Array]
"""By MoE layer of the pattern ("layer_0", ...), float32 [periods, B, E]: what each row of the batch
adds to the choice of experts, in standard deviations of a token's scores; B may be 1 for all rows.
Gates don't see it."""


def _attention(
    config: Attention,
    execution: ExecutionConfig,
    norm_eps: float,
    out_stddev: float,
    gaps: bool,
) -> Callable[..., tuple[jax.Array, Any]]:
    """The layer's attention, which takes and returns its own kind of cache."""
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, execution, out_stddev, name="attention")
    if isinstance(config, LocalSparseAttentionConfig):
        return LocalSparseAttention(config, execution, out_stddev, name="attention")
    if isinstance(config, RelativeAttentionConfig):
        return RelativeAttention(config, out_stddev, name="attention")
    return GroupedQueryAttention(
        config, execution, norm_eps, out_stddev, gaps=gaps, name="attention"
    )


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x)).

    With spec.depth, of the chosen tokens only (model/depth.py); what they are goes into the
    collection "router" as "depth" (DepthStats).
    """

    spec: LayerSpec
    model: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: BlockCache | None,
        preference_BE: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockCache | None]:
        if self.spec.depth is not None:
            rows = (x_BLD, positions_BL, segments_BL)
            return routed(self, self.spec.depth, *rows, cache, preference_BE)
        x_BLD, _, update_BLD, cache = self.branches(
            x_BLD, positions_BL, segments_BL, cache, preference_BE
        )
        return constrain(x_BLD + update_BLD, "batch", "length", None), cache

    def branches(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: BlockCache | None,
        preference_BE: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, BlockCache | None]:
        """x after attention, attention's update, the feed-forward's update, and the cache."""
        attention, ffn, eps = self.spec.attention, self.spec.ffn, self.model.norm_eps
        # Outputs of 2 * num_layers branches add up on the residual stream (GPT-2's scaling).
        depth_scale = (2 * self.model.num_layers) ** -0.5
        attention_cache, router_cache = (cache.attention, cache.router) if cache else (None, None)
        out_stddev = depth_scale * attention.out_width**-0.5
        attend = _attention(
            attention, self.execution, eps, out_stddev, gaps=self.spec.depth is not None
        )
        h_BLD = RMSNorm(eps, name="attention_norm")(x_BLD)
        own_cache = cast(Any, attention_cache)  # of the kind that `attend` keeps
        attended_BLD, attention_cache = attend(h_BLD, positions_BL, segments_BL, own_cache)
        x_BLD = constrain(x_BLD + attended_BLD, "batch", "length", None)
        h_BLD = RMSNorm(eps, name="ffn_norm")(x_BLD)
        out_stddev = depth_scale * ffn.d_ff**-0.5
        if isinstance(ffn, DenseConfig):
            update_BLD = SwiGLU(ffn, out_stddev, name="ffn")(h_BLD)
        else:
            update_BLD, router_cache = MoE(ffn, self.execution, eps, out_stddev, name="moe")(
                h_BLD, positions_BL, segments_BL, router_cache, preference_BE
            )
        cache = None if attention_cache is None else BlockCache(attention_cache, router_cache)
        return x_BLD, attended_BLD, update_BLD, cache


_TracedOnce = nn.jit(Block)
"""Equal layers share one trace and one function of the program: thirty with weights of their own
(model/unstacked.py) are traced in a sixth of the time."""

SHAPES_ALONE = "shapes_alone"
"""A key of this name says that what initialisation draws is thrown away."""


class Period(nn.Module):
    """The pattern's layers once: what the scan repeats.

    With model.early_exit, sows its result as "hidden" into the collection "exits".
    """

    model: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        cache: tuple[BlockCache, ...] | None,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        is_dropped_B: jax.Array | None = None,
        preference: Preference | None = None,
    ) -> tuple[jax.Array, tuple[BlockCache, ...] | None]:
        """Rows with is_dropped are given back as they came."""
        before_BLD, caches = x_BLD, []
        if is_dropped_B is not None:  # padding: no expert works on it, no router counts it
            positions_BL = jnp.where(is_dropped_B[:, None], -1, positions_BL)
        # Inside a function of its own, a layer would draw other values from the same seed.
        is_drawing = self.is_initializing() and not self.has_rng(SHAPES_ALONE)
        has_equals = len(set(self.model.pattern)) < len(self.model.pattern)
        kind = _TracedOnce if has_equals and not is_drawing else Block
        for i, spec in enumerate(self.model.pattern):
            block = kind(spec, self.model, self.execution, name=f"layer_{i}")
            layer_cache = None if cache is None else cache[i]
            wanted_BE = None if preference is None else preference.get(f"layer_{i}")
            x_BLD, layer_cache = block(x_BLD, positions_BL, segments_BL, layer_cache, wanted_BE)
            caches.append(layer_cache)
        if is_dropped_B is not None:
            x_BLD = jnp.where(is_dropped_B[:, None, None], before_BLD, x_BLD)
        if self.model.early_exit is not None:
            self.sow("exits", "hidden", x_BLD, init_fn=lambda: None, reduce_fn=newest)
        return x_BLD, None if cache is None else cast(tuple[BlockCache, ...], tuple(caches))
