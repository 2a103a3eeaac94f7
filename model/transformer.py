"""The decoder-only Transformer: embedding, a scanned pattern of layers, norm, output layer.

B batch, L length, D d_model, V vocab.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import ModelConfig
from configs.base import ExecutionConfig
from model.block import SHAPES_ALONE, Block, Period, Preference
from model.cache import BlockCache, Cache
from model.early_exit import dropout_rates
from model.layers import RMSNorm, document_segments, weight
from model.multi_token import MultiTokenModule, ahead
from model.seeds import seed_key
from parallel.sharding import constrain

MAX_UNROLLED_LAYERS = 8
"""Up to this depth the scan is unrolled: on CPU its stacked buffers cost a seventh of a training
step. Deeper models are scanned, so that compile time does not grow with depth.
"""


def is_scanned(config: ModelConfig) -> bool:
    """Whether a loop runs the pattern's layers; if not, each period is compiled for itself."""
    periods = config.num_periods
    return periods > 1 and periods * len(config.pattern) > MAX_UNROLLED_LAYERS


class Transformer(nn.Module):
    """hidden states of the last layer; logits are hidden @ unembedding, made by whoever needs them.

    Args:
      tokens_BL: int32 in [0, vocab_size).
      positions_BL: int32, the token's position in its document. Without a cache, a position that is
        not one above its left neighbour's starts a new document. -1 marks padding, which no token
        sees and no expert works on.
      cache: None (training, scoring), the tokens read so far (prefill, decode), or for a model with
        memory what it keeps of the segments before (training, scoring): see model/cache.py.
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
            variable_axes={"params": 0, "router_state": 0, "router": 0, "exits": 0},
            split_rngs={"params": True, SHAPES_ALONE: False},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, 0, 0)),
            length=c.num_periods,
            unroll=1 if is_scanned(c) else c.num_periods,
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
        x_BLD, segments_BL, prefix = self.begin(tokens_BL, positions_BL, cache)
        periods = None if cache is None else cache.periods
        is_dropped_PB = self._dropped_rows(tokens_BL.shape[0])
        x_BLD, periods = self.periods(
            x_BLD, periods, positions_BL, segments_BL, is_dropped_PB, preference
        )
        cache = None if periods is None else Cache(prefix=prefix, periods=periods)
        hidden_BLD = self.final_norm(x_BLD)
        if self.config.multi_token is not None and self.is_mutable_collection("multi_token"):
            self._look_ahead(hidden_BLD, tokens_BL, positions_BL, segments_BL)
        return hidden_BLD, cache

    def begin(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, jax.Array, tuple[BlockCache, ...]]:
        """What the first period reads: x_BLD and segments_BL; and the prefix's caches."""
        x_BLD, segments_BL = self._embedded(tokens_BL), document_segments(positions_BL)
        caches = []
        for i, block in enumerate(self.prefix):
            block_cache = None if cache is None else cache.prefix[i]
            x_BLD, block_cache = block(x_BLD, positions_BL, segments_BL, block_cache)
            caches.append(block_cache)
        return x_BLD, segments_BL, tuple(caches)

    def _embedded(self, tokens_BL: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.execution.compute_dtype)
        table_VD = constrain(
            self.embedding_VD.astype(dtype), "vocab", None
        )  # whole rows to look up
        return constrain(table_VD[tokens_BL], "batch", "length", None)

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

    def _look_ahead(self, hidden_BLD, tokens_BL, positions_BL, segments_BL) -> None:
        """Sows each multi-token module's hidden states into the collection "multi_token"."""
        embedded_BLD = self._embedded(tokens_BL)
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
    model: Transformer, variables: Variables, tokens_BL: jax.Array, positions_BL: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """As `hidden_states` without a cache, and what the layers sowed (the collection "router")."""
    outputs: Any = model.apply(variables, tokens_BL, positions_BL, mutable=["router"])
    (hidden_BLD, _), sown = outputs
    return hidden_BLD, sown


def training_pass(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    memory: Cache | None = None,
    depth_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any], Cache | None]:
    """What training asks of the model: hidden states, what was sown, and the next memory.

    Sown are "router"; with early_exit "exits", the states after each period; with multi_token
    "multi_token", the modules' hidden states "hidden_0", ... as one-tuples.

    Args:
      memory: of the segments before; None for models without.
      depth_key: draws the rows that skip periods (early_exit.dropout); None skips none.
    """
    outputs: Any = model.apply(
        variables,
        tokens_BL,
        positions_BL,
        memory,
        mutable=["router", "exits", "multi_token"],
        rngs={} if depth_key is None else {"depth": depth_key},
    )
    (hidden_BLD, memory), sown = outputs
    return hidden_BLD, sown, memory


def output_weights(model: Transformer, variables: Variables) -> jax.Array:
    """The output layer with these variables, [D, V] in the compute dtype."""
    return cast(jax.Array, model.apply(variables, method="unembedding"))


def abstract_variables(model: Transformer) -> tuple[Variables, Variables]:
    """Variables as ShapeDtypeStructs and the tree of their logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    keys = dict.fromkeys(("params", SHAPES_ALONE), jax.random.key(0))
    boxed = _kept(jax.eval_shape(model.init, keys, tokens, tokens))
    specs = nn.get_partition_spec(boxed["params"])
    axes = {
        "params": jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, tuple)),
        "router_state": jax.tree.map(lambda x: (None,) * x.ndim, boxed["router_state"]),
    }
    return nn.unbox(boxed), axes


def init_variables(model: Transformer, seed: int) -> Variables:
    """Fresh variables; to be jitted with out_shardings, so that each device makes its own part."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(_kept(model.init(seed_key(seed), tokens, tokens)))


def _kept(variables: Any) -> Variables:
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}
