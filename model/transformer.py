"""The decoder-only Transformer: embedding, a scanned pattern of layers, norm, output layer.

B batch, L length, D d_model, V vocab.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import (
    Attention,
    DenseConfig,
    LatentAttentionConfig,
    LayerSpec,
    LocalSparseAttentionConfig,
    ModelConfig,
    RelativeAttentionConfig,
)
from configs.base import ExecutionConfig
from model.attention.grouped_query import GroupedQueryAttention
from model.attention.latent import LatentAttention
from model.attention.local_sparse import LocalSparseAttention
from model.attention.relative import RelativeAttention
from model.cache import BlockCache, Cache
from model.depth import routed
from model.early_exit import dropout_rates
from model.layers import RMSNorm, SwiGLU, document_segments, newest, weight
from model.moe import MoE
from parallel.sharding import constrain

MAX_UNROLLED_PERIODS = 4
"""Up to this depth the scan is unrolled: on CPU its stacked buffers cost a seventh of a training
step. Deeper models are scanned, so that compile time does not grow with depth.
"""


def _attention(
    config: Attention,
    execution: ExecutionConfig,
    norm_eps: float,
    out_stddev: float,
    gaps: bool,
) -> Callable[..., tuple[jax.Array, Any]]:
    """The layer's attention, which takes and returns its own kind of cache."""
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, execution, norm_eps, out_stddev, name="attention")
    if isinstance(config, LocalSparseAttentionConfig):
        return LocalSparseAttention(config, execution, out_stddev, name="attention")
    if isinstance(config, RelativeAttentionConfig):
        return RelativeAttention(config, out_stddev, name="attention")
    return GroupedQueryAttention(config, execution, out_stddev, gaps=gaps, name="attention")


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
    ) -> tuple[jax.Array, BlockCache | None]:
        if self.spec.depth is not None:
            return routed(self, self.spec.depth, x_BLD, positions_BL, segments_BL, cache)
        x_BLD, _, update_BLD, cache = self.branches(x_BLD, positions_BL, segments_BL, cache)
        return constrain(x_BLD + update_BLD, "batch", "length", None), cache

    def branches(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        cache: BlockCache | None,
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
            update_BLD, router_cache = MoE(ffn, self.execution, out_stddev, name="moe")(
                h_BLD, positions_BL, segments_BL, router_cache
            )
        cache = None if attention_cache is None else BlockCache(attention_cache, router_cache)
        return x_BLD, attended_BLD, update_BLD, cache


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
    ) -> tuple[jax.Array, tuple[BlockCache, ...] | None]:
        """Rows with is_dropped are given back as they came."""
        before_BLD, caches = x_BLD, []
        if is_dropped_B is not None:  # padding: no expert works on it, no router counts it
            positions_BL = jnp.where(is_dropped_B[:, None], -1, positions_BL)
        for i, spec in enumerate(self.model.pattern):
            block = Block(spec, self.model, self.execution, name=f"layer_{i}")
            layer_cache = None if cache is None else cache[i]
            x_BLD, layer_cache = block(x_BLD, positions_BL, segments_BL, layer_cache)
            caches.append(layer_cache)
        if is_dropped_B is not None:
            x_BLD = jnp.where(is_dropped_B[:, None, None], before_BLD, x_BLD)
        if self.model.early_exit is not None:
            self.sow("exits", "hidden", x_BLD, init_fn=lambda: None, reduce_fn=newest)
        return x_BLD, None if cache is None else cast(tuple[BlockCache, ...], tuple(caches))


class Transformer(nn.Module):
    """hidden states of the last layer; logits are hidden @ unembedding, made by whoever needs them.

    Args:
      tokens_BL: int32 in [0, vocab_size).
      positions_BL: int32, the token's position in its document. Without a cache, a position that is
        not one above its left neighbour's starts a new document. -1 marks padding, which no token
        sees and no expert works on.
      cache: None (training, scoring), the tokens read so far (prefill, decode), or for a model with
        memory what it keeps of the segments before (training, scoring): see model/cache.py.
    Returns:
      hidden_BLD in the compute dtype, and the cache with the tokens added.
    """

    config: ModelConfig
    execution: ExecutionConfig = ExecutionConfig()

    def setup(self) -> None:
        c = self.config
        # Rows of length 1 where they are output weights too, unit entries where they only feed in.
        stddev = c.d_model**-0.5 if c.tie_embeddings else 1.0
        self.embedding_VD = weight(
            self, "embedding", (c.vocab_size, c.d_model), ("vocab", "embed"), stddev
        )
        if not c.tie_embeddings:
            self.output_DV = weight(
                self, "output", (c.d_model, c.vocab_size), ("embed", "vocab"), c.d_model**-0.5
            )
        period, block = Period, Block
        if self.execution.remat == "full":
            period = nn.remat(Period, prevent_cse=False)
            block = nn.remat(Block, prevent_cse=False)
        self.prefix = [block(spec, c, self.execution) for spec in c.prefix]
        self.periods = nn.scan(
            period,
            variable_axes={"params": 0, "router_state": 0, "router": 0, "exits": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, 0)),
            length=c.num_periods,
            unroll=c.num_periods if c.num_periods <= MAX_UNROLLED_PERIODS else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.execution)
        self.final_norm = RMSNorm(c.norm_eps)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        x_BLD, segments_BL, prefix = self.begin(tokens_BL, positions_BL, cache)
        periods = None if cache is None else cache.periods
        is_dropped_PB = self._dropped_rows(tokens_BL.shape[0])
        x_BLD, periods = self.periods(x_BLD, periods, positions_BL, segments_BL, is_dropped_PB)
        cache = None if periods is None else Cache(prefix=prefix, periods=periods)
        return self.final_norm(x_BLD), cache

    def begin(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, jax.Array, tuple[BlockCache, ...]]:
        """What the first period reads: x_BLD and segments_BL; and the prefix's caches."""
        dtype = jnp.dtype(self.execution.compute_dtype)
        table_VD = constrain(
            self.embedding_VD.astype(dtype), "vocab", None
        )  # whole rows to look up
        x_BLD = table_VD[tokens_BL]
        x_BLD = constrain(x_BLD, "batch", "length", None)
        segments_BL = document_segments(positions_BL)
        caches = []
        for i, block in enumerate(self.prefix):
            block_cache = None if cache is None else cache.prefix[i]
            x_BLD, block_cache = block(x_BLD, positions_BL, segments_BL, block_cache)
            caches.append(block_cache)
        return x_BLD, segments_BL, tuple(caches)

    def finish(self, x_BLD: jax.Array) -> jax.Array:
        """The final norm, of the last layer or of an exit: what the output layer reads."""
        return self.final_norm(x_BLD)

    def _dropped_rows(self, batch: int) -> jax.Array | None:
        """Rows that skip a period, bool [periods, B]; None unless a key "depth" asks for it."""
        exits = self.config.early_exit
        if exits is None or exits.dropout == 0 or not self.has_rng("depth"):
            return None
        rates_P1 = jnp.asarray(dropout_rates(self.config))[:, None]
        shape = (rates_P1.shape[0], batch)
        return jax.random.uniform(self.make_rng("depth"), shape) < rates_P1

    def unembedding(self) -> jax.Array:
        """The output layer, [D, V] in the compute dtype."""
        w_DV = self.embedding_VD.T if self.config.tie_embeddings else self.output_DV
        w_DV = w_DV.astype(jnp.dtype(self.execution.compute_dtype))
        return constrain(w_DV, None, "vocab")


Variables = dict[str, Any]
"""{"params": float32 masters, "router_state": what routers learn without gradients}; the latter is
empty where no router has any."""


def hidden_states(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array | np.ndarray,
    positions_BL: jax.Array | np.ndarray,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The model with these variables: see Transformer."""
    return cast(Any, model.apply(variables, tokens_BL, positions_BL, cache))


def hidden_and_router(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    depth_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """As `read_segment` without memory."""
    hidden_BLD, sown, _ = read_segment(model, variables, tokens_BL, positions_BL, None, depth_key)
    return hidden_BLD, sown


def read_segment(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    memory: Cache | None,
    depth_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any], Cache | None]:
    """What training asks of the model: hidden states, what the layers sowed (the collection
    "router" and, with early_exit, "exits"), and the memory to read the next segment with.

    Args:
      memory: of the segments before; None for models without.
      depth_key: draws the rows that skip periods (early_exit.dropout); None skips none.
    """
    mutable = ["router"] if model.config.early_exit is None else ["router", "exits"]
    rngs = {} if depth_key is None else {"depth": depth_key}
    outputs: Any = model.apply(
        variables, tokens_BL, positions_BL, memory, mutable=mutable, rngs=rngs
    )
    (hidden_BLD, memory), sown = outputs
    return hidden_BLD, sown, memory


def output_weights(model: Transformer, variables: Variables) -> jax.Array:
    """The output layer with these variables, [D, V] in the compute dtype."""
    return cast(jax.Array, model.apply(variables, method="unembedding"))


def abstract_variables(model: Transformer) -> tuple[Variables, Variables]:
    """Variables as ShapeDtypeStructs and the tree of their logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    boxed = _kept(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))
    specs = nn.get_partition_spec(boxed["params"])
    axes = {
        "params": jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, tuple)),
        "router_state": jax.tree.map(lambda x: (None,) * x.ndim, boxed["router_state"]),
    }
    return nn.unbox(boxed), axes


def init_variables(model: Transformer, seed: int) -> Variables:
    """Fresh variables; to be jitted with out_shardings, so that each device makes its own part."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(_kept(model.init(jax.random.key(seed), tokens, tokens)))


def _kept(variables: Any) -> Variables:
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}
