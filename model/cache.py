"""Keys and values of the tokens read so far, one fixed-size buffer per layer.

A layer with a window keeps a ring: its first `num_sink_tokens` slots hold the sinks for good, the
other `window_size` slots the newest tokens. A layer without one keeps a slot for every position.
Position i lies in slot i if i < X, else in X + (i - X) mod (S - X), X = num_sink_tokens.

A model with memory (relative attention) reads a text segment by segment in training and scoring:
each layer then keeps its inputs of the last M tokens instead, a `SegmentMemory`.

B batch, L new tokens, S slots, M tokens of memory, G key/value heads, C head_dim, D d_model.
"""

import jax
import jax.numpy as jnp
from flax import struct

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import (
    Attention,
    AttentionConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.feed_forward import MoEConfig
from kernels.sparse_attention import Nodes, empty_nodes


class LayerCache(struct.PyTreeNode):
    """Keys (after RoPE), values and positions of one layer; position -1 is an empty slot.

    Latent attention keeps its latent vector and rotary key as one key, and values of width 0.
    """

    k_BSGC: jax.Array
    v_BSGC: jax.Array
    positions_BS: jax.Array
    index_k_BSC: jax.Array | None = None
    """Keys of latent attention's indexer, where it has one."""
    is_empty: bool = struct.field(pytree_node=False, default=False)
    """Whether the program knows that no token was written yet: a prompt that is read into it sees
    only itself, as without a cache, and needs no scores over slots."""


class SummaryCache(struct.PyTreeNode):
    """A layer that sees summaries of what lies before its window: its tokens and the summaries."""

    tokens: LayerCache
    nodes: Nodes
    """Of all whole aligned blocks of slots, and of 2, 4, 8, ... of them, float32."""


class SegmentMemory(struct.PyTreeNode):
    """One layer's normed attention inputs of the last M tokens of a stream (Transformer-XL, 2019),
    and their positions; position -1 is an empty slot or padding. No gradient flows into it.
    """

    x_BMD: jax.Array
    positions_BM: jax.Array


class BlockCache(struct.PyTreeNode):
    """What one layer of the pattern keeps."""

    attention: LayerCache | SummaryCache | SegmentMemory
    router: LayerCache | None
    """Of a context router."""


class Cache(struct.PyTreeNode):
    """What a model keeps."""

    prefix: tuple[BlockCache, ...]
    periods: tuple[BlockCache, ...]
    """One per layer of the pattern, stacked over the periods in dim 0."""


def num_slots(config: Attention, max_length: int, spare: int = 0) -> int:
    """Slots a layer needs for sequences of max_length tokens.

    Args:
      spare: tokens that may be written and taken back (`rewind`) without loss.
    """
    if isinstance(config, RelativeAttentionConfig):
        return min(max_length, config.window_size + spare)
    if not isinstance(config, AttentionConfig) or config.window_size is None:
        return max_length
    return min(max_length, config.num_sink_tokens + config.window_size + spare)


def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    dtype: str,
    spare: int = 0,
    *,
    for_prompt: bool = False,
) -> Cache:
    """Empty caches for a batch of sequences of at most max_length tokens.

    Args:
      spare: see `num_slots`.
      for_prompt: what reads them first is a whole prompt, of two tokens or more (see
        LayerCache.is_empty); without it the first step's program may be any later one's.
    """

    def one(attention: Attention, dtype: str, stack: tuple[int, ...]) -> LayerCache:
        slots = (*stack, batch_size, num_slots(attention, max_length, spare))
        if isinstance(attention, LatentAttentionConfig):
            heads, key, value = 1, attention.latent_rank + attention.rope_head_dim, 0
        elif isinstance(attention, RelativeAttentionConfig):
            heads, key, value = attention.num_heads, attention.head_dim, attention.head_dim
        else:
            heads, key, value = attention.num_kv_heads, attention.head_dim, attention.head_dim
        indexer = getattr(attention, "indexer", None)
        return LayerCache(
            k_BSGC=jnp.zeros((*slots, heads, key), dtype),
            v_BSGC=jnp.zeros((*slots, heads, value), dtype),
            positions_BS=jnp.full(slots, -1, jnp.int32),
            index_k_BSC=indexer and jnp.zeros((*slots, indexer.head_dim), dtype),
            is_empty=for_prompt,
        )

    def of_layer(attention: Attention, stack: tuple[int, ...]) -> LayerCache | SummaryCache:
        tokens = one(attention, dtype, stack)
        if not isinstance(attention, LocalSparseAttentionConfig) or attention.block_size is None:
            return tokens
        heads, width = attention.num_kv_heads, attention.head_dim
        dims = (*stack, batch_size)
        return SummaryCache(
            tokens, empty_nodes(dims, max_length, attention.block_size, heads, width, width)
        )

    def block(spec: LayerSpec, stack: tuple[int, ...]) -> BlockCache:
        context = spec.ffn.router.context if isinstance(spec.ffn, MoEConfig) else None
        if context is None or context.kind != "causal":
            return BlockCache(of_layer(spec.attention, stack), None)
        router = one(context.attention(), "float32", stack)
        return BlockCache(of_layer(spec.attention, stack), router)

    return Cache(
        prefix=tuple(block(spec, ()) for spec in config.prefix),
        periods=tuple(block(spec, (config.num_periods,)) for spec in config.pattern),
    )


def init_memory(config: ModelConfig, batch_size: int, dtype: str) -> Cache | None:
    """Empty memories for a batch of streams; None for a model without memory."""
    if config.memory_length is None:
        return None
    shape = (batch_size, config.memory_length)

    def block(stack: tuple[int, ...]) -> BlockCache:
        memory = SegmentMemory(
            x_BMD=jnp.zeros((*stack, *shape, config.d_model), dtype),
            positions_BM=jnp.full((*stack, *shape), -1, jnp.int32),
        )
        return BlockCache(memory, None)

    return Cache(
        prefix=tuple(block(()) for _ in config.prefix),
        periods=tuple(block((config.num_periods,)) for _ in config.pattern),
    )


def rewind(cache: Cache, position_B: jax.Array) -> Cache:
    """The cache without the tokens from these positions on, at most `spare` of which were written.

    Their slots become empty; keys and values stay until they are written over.
    """

    def emptied(path: tuple, x: jax.Array) -> jax.Array:
        if path[-1] != jax.tree_util.GetAttrKey("positions_BS"):
            return x
        return jnp.where(x >= jnp.broadcast_to(position_B[:, None], x.shape), -1, x)

    return jax.tree_util.tree_map_with_path(emptied, cache)


def append(
    cache: LayerCache,
    k_BLGC: jax.Array,
    v_BLGC: jax.Array,
    positions_BL: jax.Array,
    num_sink_tokens: int,
    index_k_BLC: jax.Array | None = None,
) -> tuple[LayerCache, LayerCache]:
    """Returns the cache with the new tokens in it, and the old cache followed by the new tokens.

    The second one is what the new tokens attend to: writing first would overwrite keys that the
    earlier of them still see. Tokens at position -1 are padding and are not written; of those that
    share a ring slot, only the newest is.

    Args:
      index_k_BLC: the indexer's keys, for a cache that holds such.
    """
    cache = cache.replace(is_empty=False)
    new = LayerCache(k_BLGC, v_BLGC, positions_BL, index_k_BLC)
    seen = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache, new
    )
    slots = cache.positions_BS.shape[1]
    ring = max(slots - num_sink_tokens, 1)
    newest_B1 = positions_BL.max(axis=1, keepdims=True)
    is_kept_BL = (positions_BL < num_sink_tokens) | (positions_BL > newest_B1 - ring)
    slot_BL = jnp.where(
        positions_BL < num_sink_tokens,
        positions_BL,
        num_sink_tokens + (positions_BL - num_sink_tokens) % ring,
    )
    slot_BL = jnp.where(is_kept_BL & (positions_BL >= 0), slot_BL, slots)  # past the end: dropped
    row_B1 = jnp.arange(slot_BL.shape[0])[:, None]

    def write(old, new):
        return old.at[row_B1, slot_BL].set(new.astype(old.dtype), mode="drop")

    return jax.tree.map(write, cache, new), seen
