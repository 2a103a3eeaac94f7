"""The decoder-only Transformer: embedding, a scanned pattern of layers, norm, output layer.

B batch, L length, D d_model, V vocab.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import DenseConfig, LatentAttentionConfig, LayerSpec, ModelConfig
from configs.base import ExecutionConfig
from model.attention.grouped_query import GroupedQueryAttention
from model.attention.latent import LatentAttention
from model.cache import BlockCache, Cache
from model.layers import RMSNorm, SwiGLU, weight
from model.moe import MoE
from model.multi_token import MultiTokenModule, ahead
from parallel.sharding import constrain

MAX_UNROLLED_PERIODS = 4
"""Up to this depth the scan is unrolled: on CPU its stacked buffers cost a seventh of a training
step. Deeper models are scanned, so that compile time does not grow with depth.
"""


Preference = dict[str, jax.Array]
"""By MoE layer of the pattern ("layer_0", ...), float32 [periods, B, E]: what each row of the batch
adds to the choice of experts, in standard deviations of a token's scores; B may be 1 for all rows.
Gates don't see it."""


def document_segments(positions_BL: jax.Array) -> jax.Array:
    """Numbers the documents of each row, int32 [B, L]: one ends where positions stop rising by
    one.
    """
    is_start_BL = positions_BL[:, 1:] != positions_BL[:, :-1] + 1
    return jnp.pad(jnp.cumsum(is_start_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

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
        attention, ffn, eps = self.spec.attention, self.spec.ffn, self.model.norm_eps
        # Outputs of 2 * num_layers branches add up on the residual stream (GPT-2's scaling).
        depth_scale = (2 * self.model.num_layers) ** -0.5
        attention_cache, router_cache = (cache.attention, cache.router) if cache else (None, None)
        out_stddev = depth_scale * attention.out_width**-0.5
        if isinstance(attention, LatentAttentionConfig):
            attend = LatentAttention(attention, self.execution, eps, out_stddev, name="attention")
        else:
            attend = GroupedQueryAttention(attention, self.execution, out_stddev, name="attention")
        h_BLD = RMSNorm(eps, name="attention_norm")(x_BLD)
        update_BLD, attention_cache = attend(h_BLD, positions_BL, segments_BL, attention_cache)
        x_BLD = constrain(x_BLD + update_BLD, "batch", "length", None)
        h_BLD = RMSNorm(eps, name="ffn_norm")(x_BLD)
        out_stddev = depth_scale * ffn.d_ff**-0.5
        if isinstance(ffn, DenseConfig):
            update_BLD = SwiGLU(ffn, out_stddev, name="ffn")(h_BLD)
        else:
            update_BLD, router_cache = MoE(ffn, self.execution, out_stddev, name="moe")(
                h_BLD, positions_BL, segments_BL, router_cache, preference_BE
            )
        cache = None if attention_cache is None else BlockCache(attention_cache, router_cache)
        return constrain(x_BLD + update_BLD, "batch", "length", None), cache


class Period(nn.Module):
    """The pattern's layers once: what the scan repeats."""

    model: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        cache: tuple[BlockCache, ...] | None,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        preference: Preference | None,
    ) -> tuple[jax.Array, tuple[BlockCache, ...] | None]:
        caches = []
        for i, spec in enumerate(self.model.pattern):
            block = Block(spec, self.model, self.execution, name=f"layer_{i}")
            layer_cache = None if cache is None else cache[i]
            wanted_BE = None if preference is None else preference.get(f"layer_{i}")
            x_BLD, layer_cache = block(x_BLD, positions_BL, segments_BL, layer_cache, wanted_BE)
            caches.append(layer_cache)
        return x_BLD, None if cache is None else cast(tuple[BlockCache, ...], tuple(caches))


class Transformer(nn.Module):
    """hidden states of the last layer; logits are hidden @ unembedding, made by whoever needs them.

    Args:
      tokens_BL: int32 in [0, vocab_size).
      positions_BL: int32, the token's position in its document. Without a cache, a position that is
        not one above its left neighbour's starts a new document. -1 marks padding, which no token
        sees and no expert works on.
      cache: None (training, scoring), or the tokens read so far (prefill, decode: see
        model/cache.py).
      preference: None, or the experts that requests would rather have (see Preference).
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
            variable_axes={"params": 0, "router_state": 0, "router": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, 0)),
            length=c.num_periods,
            unroll=c.num_periods if c.num_periods <= MAX_UNROLLED_PERIODS else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.execution)
        self.final_norm = RMSNorm(c.norm_eps)
        if c.multi_token is not None:
            layer = c.multi_token.layer
            self.multi_token = [
                MultiTokenModule(block(layer, c, self.execution, parent=None), c.norm_eps)
                for _ in range(c.multi_token.depth)
            ]

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        cache: Cache | None = None,
        preference: Preference | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        dtype = jnp.dtype(self.execution.compute_dtype)
        table_VD = constrain(
            self.embedding_VD.astype(dtype), "vocab", None
        )  # whole rows to look up
        x_BLD = table_VD[tokens_BL]
        x_BLD = constrain(x_BLD, "batch", "length", None)
        embedded_BLD, segments_BL = x_BLD, document_segments(positions_BL)
        caches = []
        for i, block in enumerate(self.prefix):
            block_cache = None if cache is None else cache.prefix[i]
            x_BLD, block_cache = block(x_BLD, positions_BL, segments_BL, block_cache)
            caches.append(block_cache)
        periods = None if cache is None else cache.periods
        x_BLD, periods = self.periods(x_BLD, periods, positions_BL, segments_BL, preference)
        cache = None if periods is None else Cache(prefix=tuple(caches), periods=periods)
        hidden_BLD = self.final_norm(x_BLD)
        if self.config.multi_token is not None and self.is_mutable_collection("multi_token"):
            self._look_ahead(hidden_BLD, embedded_BLD, positions_BL, segments_BL)
        return hidden_BLD, cache

    def _look_ahead(self, hidden_BLD, embedded_BLD, positions_BL, segments_BL) -> None:
        """Sows each multi-token module's hidden states into the collection "multi_token"."""
        for k, module in enumerate(self.multi_token):
            next_BLD = ahead(embedded_BLD, k + 1)
            hidden_BLD = module(hidden_BLD, next_BLD, positions_BL, segments_BL)
            self.sow("multi_token", f"hidden_{k}", hidden_BLD)

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
    preference: Preference | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The model with these variables: see Transformer."""
    return cast(Any, model.apply(variables, tokens_BL, positions_BL, cache, preference))


def hidden_and_router(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    *,
    multi_token: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """As `hidden_states` without a cache, and what the layers sowed (the collection "router").

    Args:
      multi_token: whether to compute the multi-token modules too, if the model has any: their
        hidden states are "hidden_0", ... of the collection "multi_token", as one-tuples.
    """
    collections = ["router", "multi_token"] if multi_token else ["router"]
    outputs: Any = model.apply(variables, tokens_BL, positions_BL, mutable=collections)
    (hidden_BLD, _), sown = outputs
    return hidden_BLD, sown


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
