"""The decoder-only Transformer: embedding, a scanned pattern of layers, norm, output layer.

B batch, L length, D d_model, V vocab.
"""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, assert_never, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import ModelConfig
from configs.base import ExecutionConfig
from kernels.quantize import MatrixDims, QTensor
from model.attention.kinds import Shareable
from model.block import Block, GivenToBlock, GivenToPeriods, Period
from model.early_exit import dropout_rates
from model.hyper_connections import StreamReader, spread
from model.layers import (
    SHAPES_ALONE,
    CappedOutput,
    Declared,
    OutputsFirst,
    RMSNorm,
    in_dtype,
    look_up,
    weight,
)
from model.model_state import ModelState
from model.moe_layers import moe_layers
from model.multi_token import MultiTokenModule, ahead
from model.per_layer_embeddings import PerLayerInputs, split_by_layer
from model.seeds import seed_key
from model.step import ChosenExperts, Preference, Step, make_step
from parallel.sharding import constrain

MAX_UNROLLED_LAYERS = 8
"""Up to this depth the scan is unrolled: on CPU its stacked buffers cost a seventh of a training
step. Deeper models are scanned, so that compile time does not grow with depth.
"""

SCANNED = (
    *("params", "router_state", "adapters"),
    *("router", "exits", "activations", "experts"),
)
"""Collections whose arrays the scan stacks."""

VOCABULARY = ("embedding", "output", "per_layer_embeddings.table")
"""Parameters that have a row or column for each token of the vocabulary."""


def is_scanned(config: ModelConfig) -> bool:
    """Whether a loop runs the pattern's layers; if not, each period is compiled for itself."""
    periods = config.num_periods
    return periods > 1 and periods * len(config.pattern) > MAX_UNROLLED_LAYERS


class Transformer(nn.Module):
    """Hidden states of the last layer; logits are hidden @ unembedding, made by whoever needs them.

    Args:
      step: tokens, their positions and documents (model/step.py). Without a state, a position that
        is not one above its left neighbour's starts a new document.
      state: None (training, scoring), what the layers keep of the tokens read so far (prefill,
        decode), or for a model with memory what it keeps of the segments before (training,
        scoring): see model/model_state.py.
    Returns:
      hidden_BLD in the compute dtype, and the state with the tokens added.
    """

    config: ModelConfig
    execution: ExecutionConfig = ExecutionConfig()

    def setup(self) -> None:
        c = self.config
        # Rows of length 1 where they are output weights too, unit entries where they only feed in.
        stddev = c.d_model**-0.5 if c.tie_embeddings else 1.0
        self.embedding_VD = weight(
            self,
            "embedding",
            (c.vocab_size, c.d_model),
            ("vocab", "embed"),
            stddev,
            MatrixDims(1, 1, outputs_first=True),
        )
        if not c.tie_embeddings:
            shape, axes = (c.d_model, c.vocab_size), ("embed", "vocab")
            self.output_DV = weight(self, "output", shape, axes, c.d_model**-0.5, MatrixDims(1, 1))
        period, block = Period, Block
        if self.execution.remat == "full":
            period = nn.remat(Period, prevent_cse=False)
            block = nn.remat(Block, prevent_cse=False)
        elif self.execution.remat != "none":
            assert_never(self.execution.remat)
        self.prefix = [
            block(spec, c, self.execution, i in c.key_sources) for i, spec in enumerate(c.prefix)
        ]
        if c.per_layer_embeddings is not None:
            sizes = (c.num_layers, c.vocab_size, c.norm_eps, c.zero_centered_norms)
            self.per_layer_embeddings = PerLayerInputs(c.per_layer_embeddings, *sizes)
        self.periods = nn.scan(
            period,
            variable_axes=dict.fromkeys(SCANNED, 0),
            split_rngs={"params": True, SHAPES_ALONE: False},
            in_axes=cast(Any, (0, nn.broadcast, 0, 0, 0, 0, nn.broadcast)),
            length=c.num_periods,
            unroll=1 if is_scanned(c) else c.num_periods,
            # Traces all layers once more, to look for broadcasts that none makes. Where weights are
            # drawn that moves the keys, and a seed is to draw what it always drew.
            check_constancy_invariants=self.is_initializing() and not self.has_rng(SHAPES_ALONE),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.execution)
        self.final_norm = RMSNorm(c.norm_eps, is_zero_centered=c.zero_centered_norms)
        if c.hyper_connections is not None:
            self.final_streams = StreamReader(c.hyper_connections, c.norm_eps)
        if c.multi_token is not None:
            layer = c.multi_token.layer
            self.multi_token = [
                MultiTokenModule(
                    block(layer, c, self.execution, parent=None), c.norm_eps, c.zero_centered_norms
                )
                for _ in range(c.multi_token.depth)
            ]

    def __call__(
        self, step: Step, state: ModelState | None = None
    ) -> tuple[jax.Array, ModelState | None]:
        x_BLD, state, given = self.begin(step, state)
        x_BLD, state = self.run_periods(x_BLD, step, state, given)
        hidden_BLD = self.finish(x_BLD)
        if self.config.multi_token is not None and self.is_mutable_collection("multi_token"):
            self._look_ahead(hidden_BLD, step)
        return hidden_BLD, state

    def begin(
        self, step: Step, state: ModelState | None
    ) -> tuple[jax.Array, ModelState | None, GivenToPeriods]:
        """What the first period reads, x_BLD (with hyper_connections [B, L, N, D], here and until
        `finish`), the state with the prefix's tokens, and what the pattern's layers get beside."""
        c, x_BLD = self.config, self._embedded(step.tokens_BL)
        blocks, vectors, vectors_PBLNW = [], [None] * len(c.prefix), None
        if c.per_layer_embeddings is not None:
            given_BLNW = self.per_layer_embeddings(step.tokens_BL, x_BLD)
            vectors, vectors_PBLNW = split_by_layer(given_BLNW, len(c.prefix), c.num_periods)
        read: dict[int, Shareable] = {}
        if self.config.hyper_connections is not None:
            x_BLD = spread(x_BLD, self.config.hyper_connections)
        for i, block in enumerate(self.prefix):
            given = GivenToBlock.of(vectors[i], c.key_sources[i], read)
            block_state = None if state is None else state.prefix[i]
            x_BLD, block_state, made = block(x_BLD, step, block_state, given=given)
            blocks.append(block_state)
            if made is not None:
                read[i] = made
        given = GivenToPeriods(vectors_PBLNW, read)
        return x_BLD, None if state is None else state.replace(prefix=tuple(blocks)), given

    def run_periods(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: ModelState | None,
        given: GivenToPeriods = GivenToPeriods(),
    ) -> tuple[jax.Array, ModelState | None]:
        """x after the pattern's layers, or after step.layers of them, and the state.

        Args:
          given: of `begin`, of a model that has something of it.
        Raises:
          ValueError: step.layers of a model whose pattern repeats (see model/unstacked.py).
        """
        if step.layers is not None and self.config.num_periods > 1:
            raise ValueError("layers of a repeated pattern have no numbers: unstack the model")
        is_dropped_PB = self._dropped_rows(x_BLD.shape[0])
        preference, chosen = step.preference, step.chosen
        step = step.replace(preference=None, chosen=None)
        rest = (step, is_dropped_PB, preference, chosen, given.vectors_PBLNW, given.read)
        if state is None:
            (x_BLD, _), _ = self.periods((x_BLD, None), None, *rest)
            return x_BLD, None
        if state.is_stacked:
            (x_BLD, _), states = self.periods((x_BLD, None), state.periods, *rest)
        else:
            (x_BLD, states), _ = self.periods((x_BLD, state.periods), None, *rest)
        return x_BLD, state.replace(periods=states)

    def _embedded(self, tokens_BL: jax.Array) -> jax.Array:
        x_BLD, scale = self._looked_up(tokens_BL), self.config.embedding_scale
        return x_BLD if scale == 1.0 else scale * x_BLD

    def _looked_up(self, tokens_BL: jax.Array) -> jax.Array:
        return look_up(self.embedding_VD, tokens_BL, jnp.dtype(self.execution.compute_dtype))

    def finish(self, x_BLD: jax.Array) -> jax.Array:
        """The final norm, of the last layer or of an exit: what the output layer reads, the logits'
        factor in it.
        """
        if self.config.hyper_connections is not None:
            x_BLD = self.final_streams(x_BLD)
        hidden_BLD, scale = self.final_norm(x_BLD), self.config.logit_scale
        return hidden_BLD if scale == 1.0 else scale * hidden_BLD

    def _dropped_rows(self, batch: int) -> jax.Array | None:
        """Rows that skip a period, bool [periods, B]; None unless a key "depth" asks for it."""
        exits = self.config.early_exit
        if exits is None or exits.dropout == 0 or not self.has_rng("depth"):
            return None
        rates_P1 = jnp.asarray(dropout_rates(self.config))[:, None]
        shape = (rates_P1.shape[0], batch)
        return jax.random.uniform(self.make_rng("depth"), shape) < rates_P1

    def _look_ahead(self, hidden_BLD: jax.Array, step: Step) -> None:
        """Sows each multi-token module's hidden states into the collection "multi_token"."""
        embedded_BLD = self._embedded(step.tokens_BL)
        for k, module in enumerate(self.multi_token):
            next_BLD = ahead(embedded_BLD, k + 1)
            hidden_BLD, _ = module(hidden_BLD, next_BLD, step)
            self.sow("multi_token", f"hidden_{k}", hidden_BLD)

    def look_ahead(
        self, hidden_BLD: jax.Array, next_BL: jax.Array, step: Step, state: ModelState
    ) -> tuple[jax.Array, ModelState]:
        """What the output layer reads to predict the token after the next, by the first multi-token
        module: [B, L, D], and its state (of `ahead_config`) with these places.

        Args:
          hidden_BLD: what the model gave at these places; or the module, of places beyond.
          next_BL: int32, the token that follows each.
        """
        (block_state,) = state.periods
        next_BLD = self._embedded(next_BL)
        hidden_BLD, block_state = self.multi_token[0](hidden_BLD, next_BLD, step, block_state)
        return hidden_BLD, state.replace(periods=(block_state,))

    def unembedding(
        self, *, as_stored: bool = False
    ) -> jax.Array | QTensor | OutputsFirst | CappedOutput:
        """The output layer, [D, V] in the compute dtype; a QTensor as it is held; a CappedOutput of
        either where the logits are bounded.

        Args:
          as_stored: for `model.layers.unembed`, which reads an embedding, or an array in bfloat16
            where kernels do, as it lies.
        """
        w, cap = self._output_layer(as_stored), self.config.logit_cap
        return w if cap is None else CappedOutput(w, cap)

    def _output_layer(self, as_stored: bool) -> jax.Array | QTensor | OutputsFirst:
        is_tied, dtype = self.config.tie_embeddings, jnp.dtype(self.execution.compute_dtype)
        held = self.embedding_VD if is_tied else self.output_DV
        if isinstance(held, QTensor):
            return held
        if as_stored:
            w = cast(jax.Array, in_dtype(held, dtype))
            return OutputsFirst(w) if is_tied else w
        w_DV = (held.T if is_tied else held).astype(dtype)
        return constrain(w_DV, None, "vocab")


Variables = dict[str, Any]
"""{"params": float32 masters, "router_state": what routers learn without gradients}; the latter is
empty where no router has any. With "adapters", matrices have low-rank ones beside them
(model/adapters.py)."""


def forward(
    model: Transformer, variables: Variables, step: Step, state: ModelState | None = None
) -> tuple[jax.Array, ModelState | None]:
    """The model with these variables: see Transformer."""
    return cast(Any, model.apply(variables, step, state))


def forward_and_experts(
    model: Transformer, variables: Variables, step: Step, state: ModelState | None = None
) -> tuple[jax.Array, ModelState | None, ChosenExperts]:
    """As `forward`, and the experts that each token went to."""
    outputs: Any = model.apply(variables, step, state, mutable=["experts"])
    (hidden_BLD, state), sown = outputs
    chosen = {
        name: jnp.asarray(layer.of(sown["experts"])["ids"])
        for name, layer in moe_layers(model.config).items()
        if layer.periods
    }
    return hidden_BLD, state, chosen


def hidden_states(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array | np.ndarray,
    positions_BL: jax.Array | np.ndarray,
    state: ModelState | None = None,
    preference: Preference | None = None,
    *,
    is_whole: bool = False,
) -> tuple[jax.Array, ModelState | None]:
    """As `forward`, of rows of tokens: the step is made of them (see model/step.py)."""
    tokens_BL, positions_BL = jnp.asarray(tokens_BL), jnp.asarray(positions_BL)
    step = make_step(tokens_BL, positions_BL, preference=preference, is_whole=is_whole)
    return forward(model, variables, step, state)


def hidden_and_router(
    model: Transformer, variables: Variables, tokens_BL: jax.Array, positions_BL: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """As `hidden_states` without a state, and what the layers sowed (the collection "router")."""
    step = make_step(tokens_BL, positions_BL)
    outputs: Any = model.apply(variables, step, mutable=["router"])
    (hidden_BLD, _), sown = outputs
    return hidden_BLD, sown


def training_pass(
    model: Transformer,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    memory: ModelState | None = None,
    depth_key: jax.Array | None = None,
    *,
    chosen: ChosenExperts | None = None,
    is_replayed: bool = True,
    with_activations: bool = False,
) -> tuple[jax.Array, dict[str, Any], ModelState | None]:
    """What training asks of the model: hidden states, what was sown, and the next memory.

    Sown are "router"; with early_exit "exits", the states after each period; with multi_token
    "multi_token", the modules' hidden states "hidden_0", ... as one-tuples; on demand
    "activations", what the layers of the pattern give (model/block.py).

    Args:
      memory: of the segments before; None for models without.
      depth_key: draws the rows that skip periods (early_exit.dropout); None skips none.
      chosen, is_replayed: see Step.
    """
    outputs: Any = model.apply(
        variables,
        make_step(tokens_BL, positions_BL, chosen=chosen).replace(is_replayed=is_replayed),
        memory,
        mutable=["router", "exits", "multi_token", *["activations"] * with_activations],
        rngs={} if depth_key is None else {"depth": depth_key},
    )
    (hidden_BLD, memory), sown = outputs
    return hidden_BLD, sown, memory


def output_weights(model: Transformer, variables: Variables, *, as_stored: bool = False) -> Any:
    """The output layer with these variables: [D, V] in the compute dtype, or a QTensor, or a
    CappedOutput of either, which `model.layers.unembed` multiplies by.

    Args:
      as_stored: see Transformer.unembedding; for `unembed` alone.
    """
    return model.apply(variables, method="unembedding", as_stored=as_stored)


def abstract_variables(model: Transformer) -> tuple[Variables, Variables]:
    """Variables as ShapeDtypeStructs and the tree of their logical axes; nothing is allocated."""
    variables, axes, _ = _declared(model)
    return _copied(variables), _copied(axes)


def weight_dims(model: Transformer) -> Any:
    """Which dimensions of each parameter make its matrix, as a MatrixDims; None of those that stay
    in floats. In a tree like variables["params"]."""
    return _copied(_declared(model)[2])


def _declared(model: Transformer) -> tuple[Variables, Variables, Any]:
    key = cast(Hashable, model)  # a frozen dataclass of frozen ones
    return _abstract(key, jax.sharding.get_abstract_mesh())


def _copied(tree: Any) -> Any:
    return {name: _copied(x) for name, x in tree.items()} if isinstance(tree, dict) else tree


@lru_cache(maxsize=64)
def _abstract(model: Any, mesh: jax.sharding.AbstractMesh) -> tuple[Variables, Variables, Any]:
    """Variables, their axes and the parameters' MatrixDims. Known from then on: tracing takes a
    second and more, and a program asks several times.

    Args:
      mesh: the one in use.
    """
    del mesh
    tokens = jnp.zeros((1, 2), jnp.int32)
    keys = dict.fromkeys(("params", SHAPES_ALONE), jax.random.key(0))
    boxed = _kept(jax.eval_shape(model.init, keys, make_step(tokens, tokens)))
    specs = nn.get_partition_spec(boxed["params"])
    axes = {
        "params": jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, tuple)),
        "router_state": jax.tree.map(lambda x: (None,) * x.ndim, boxed["router_state"]),
    }
    dims = jax.tree.map(
        lambda box: box.dims if isinstance(box, Declared) else None,
        boxed["params"],
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
    return nn.unbox(boxed), axes, dims


def init_variables(model: Transformer, seed: int) -> Variables:
    """Fresh variables; to be jitted with out_shardings, so that each device makes its own part."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(_kept(model.init(seed_key(seed), make_step(tokens, tokens))))


def _kept(variables: Any) -> Variables:
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}
