"""What a model repeats: a layer (Block), and the pattern's layers once (Period).

B batch, L length, D d_model, E experts.
"""

from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from configs.architecture import LayerSpec, ModelConfig
from configs.base import ExecutionConfig
from configs.feed_forward import DenseConfig, MoEConfig, NoFeedForwardConfig
from model.attention.kinds import Shareable, attention_layer
from model.depth import routed
from model.hyper_connections import StreamMixer, read, written
from model.layer_state import AnyKeyValueState, LayerState, StateParts
from model.layers import SHAPES_ALONE, RMSNorm, SwiGLU, newest, one_weight
from model.model_state import BlockState
from model.moe import MoE
from model.per_layer_embeddings import PerLayerUpdate
from model.step import ChosenExperts, Preference, Step
from parallel.sharding import constrain


class GivenToBlock(struct.PyTreeNode):
    """What a layer gets beside the residual stream, each where the model has it."""

    vectors_BLW: jax.Array | None = None
    """Its vectors of the tokens (model/per_layer_embeddings.py)."""
    keys: Shareable | None = None
    """What the layer's queries read that it shares keys with, or what its indexer chose."""

    @classmethod
    def of(
        cls, vectors_BLW: jax.Array | None, source: int | None, read: dict[int, Shareable]
    ) -> "GivenToBlock":
        """
        Args:
          source: the number of that layer (ModelConfig.key_sources).
          read: what the sources before have read, by number.
        """
        return cls(vectors_BLW, None if source is None else read[source])


class GivenToPeriods(struct.PyTreeNode):
    """The same of the pattern's layers, as the prefix leaves it."""

    vectors_PBLNW: jax.Array | None = None
    """Of each period's layers."""
    read: dict[int, Shareable] = struct.field(default_factory=dict)
    """What sources in the prefix have read, by number."""


class Block(nn.Module):
    """Residual block: x + attention(norm(x)), then x + ffn(norm(x)), or one of them alone; see
    LayerSpec.norms for other places of the norms.

    With spec.depth, of the chosen tokens only (model/depth.py); what they are goes into the
    collection "router" as "depth" (DepthStats). Sows its result and what its attention adds into
    the collection "activations", where one asks for it, as "hidden" and "attended".
    """

    spec: LayerSpec
    model: ModelConfig
    execution: ExecutionConfig
    is_source: bool = False
    """Whether a later layer reads what this one's queries read (ModelConfig.key_sources)."""

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: BlockState | None,
        preference_BE: jax.Array | None = None,
        chosen_BLK: jax.Array | None = None,
        given: GivenToBlock = GivenToBlock(),
    ) -> tuple[jax.Array, BlockState | None, Shareable | None]:
        """The layer's result, its state, and of a source what its queries read."""
        if self.spec.depth is not None:
            return *routed(self, self.spec.depth, x_BLD, step, state, preference_BE), None
        if self.model.hyper_connections is not None:
            return *self._over_streams(x_BLD, step, state, preference_BE, chosen_BLK), None
        x_BLD, attended_BLD, update_BLD, state, read = self.branches(
            x_BLD, step, state, preference_BE, chosen_BLK, given.keys
        )
        x_BLD = constrain(x_BLD + update_BLD, "batch", "length", None)
        if self.model.per_layer_embeddings is not None:
            assert given.vectors_BLW is not None
            add = PerLayerUpdate(self.model.per_layer_embeddings, name="per_layer")
            added_BLD = self._norm("per_layer_norm")(add(x_BLD, given.vectors_BLW))
            x_BLD = constrain(x_BLD + added_BLD, "batch", "length", None)
        if self.spec.output_scale:
            x_BLD *= one_weight(self, "output_scale", (1,), (None,)).astype(x_BLD.dtype)[None, None]
        for name, value in (("hidden", x_BLD), ("attended", attended_BLD)):
            self.sow("activations", name, value, init_fn=lambda: None, reduce_fn=newest)
        return x_BLD, state, read if self.is_source else None

    def branches(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: BlockState | None,
        preference_BE: jax.Array | None,
        chosen_BLK: jax.Array | None = None,
        keys: Shareable | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, BlockState | None, Shareable | None]:
        """x after attention, attention's update, the feed-forward's update, the state, and what the
        queries read.

        Args:
          keys: what those of the layer read that this one shares keys with.
        """
        attention_state, router_state = (state.attention, state.router) if state else (None, None)
        attended_BLD, read = jnp.zeros_like(x_BLD), None
        update_BLD = attended_BLD
        if self.spec.has_attention:
            attended_BLD, attention_state, read = self._attended(x_BLD, step, attention_state, keys)
            x_BLD = constrain(x_BLD + attended_BLD, "batch", "length", None)
        if self.spec.has_feed_forward:
            update_BLD, router_state = self._fed(
                x_BLD, step, router_state, preference_BE, chosen_BLK
            )
        state = None if attention_state is None else BlockState(attention_state, router_state)
        return x_BLD, attended_BLD, update_BLD, state, read

    def _over_streams(
        self,
        x_BLND: jax.Array,
        step: Step,
        state: BlockState | None,
        preference_BE: jax.Array | None,
        chosen_BLK: jax.Array | None,
    ) -> tuple[jax.Array, BlockState | None]:
        """The layer on several residual streams (model/hyper_connections.py). Sows the mean of its
        streams as "hidden"."""
        config, eps = self.model.hyper_connections, self.model.norm_eps
        assert config is not None
        attention_state, router_state = (state.attention, state.router) if state else (None, None)
        mixing = StreamMixer(config, eps, name="attention_streams")(x_BLND)
        x_BLD = read(x_BLND, mixing.read_BLN)
        attended_BLD, attention_state, _ = self._attended(x_BLD, step, attention_state)
        x_BLND = constrain(written(x_BLND, attended_BLD, mixing), "batch", "length", None, None)
        mixing = StreamMixer(config, eps, name="ffn_streams")(x_BLND)
        x_BLD = read(x_BLND, mixing.read_BLN)
        update_BLD, router_state = self._fed(x_BLD, step, router_state, preference_BE, chosen_BLK)
        x_BLND = constrain(written(x_BLND, update_BLD, mixing), "batch", "length", None, None)
        for name, value in (("hidden", x_BLND.mean(axis=2)), ("attended", attended_BLD)):
            self.sow("activations", name, value, init_fn=lambda: None, reduce_fn=newest)
        state = None if attention_state is None else BlockState(attention_state, router_state)
        return x_BLND, state

    @property
    def _depth_scale(self) -> float:
        """Outputs of 2 * num_layers branches add up on the residual stream (GPT-2's scaling)."""
        return (2 * self.model.num_layers) ** -0.5

    def _attended(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: LayerState | StateParts | None,
        keys: Shareable | None = None,
    ) -> tuple[jax.Array, LayerState | StateParts | None, Shareable | None]:
        """What attention adds to the residual stream, its state, and what its queries read."""
        attention = self.spec.attention
        attend = attention_layer(
            attention,
            self.execution,
            self.model.norm_eps,
            self._depth_scale * attention.out_width**-0.5,
            gaps=self.spec.depth is not None,
        )
        h_BLD = self._read(x_BLD, "attention_norm")
        attended_BLD, state, read = attend(h_BLD, step, state, keys)
        return self._added(attended_BLD, "attention_norm_after"), state, read

    def _fed(
        self,
        x_BLD: jax.Array,
        step: Step,
        router_state: AnyKeyValueState | None,
        preference_BE: jax.Array | None,
        chosen_BLK: jax.Array | None,
    ) -> tuple[jax.Array, AnyKeyValueState | None]:
        """What the feed-forward adds to the residual stream, and its router's state."""
        ffn, eps, depth_scale = self.spec.ffn, self.model.norm_eps, self._depth_scale
        assert not isinstance(ffn, NoFeedForwardConfig)
        h_BLD = self._read(x_BLD, "ffn_norm")
        out_stddev = depth_scale * ffn.d_ff**-0.5
        if isinstance(ffn, DenseConfig):
            update_BLD = SwiGLU(ffn, out_stddev, name="ffn")(h_BLD)
        elif isinstance(ffn, MoEConfig):
            dense_BLD = None
            if self.spec.dense is not None:
                dense_BLD = self._dense_beside(self.spec.dense, h_BLD, depth_scale)
                h_BLD = self._norm("moe_norm")(x_BLD)
            moe = MoE(ffn, self.execution, eps, out_stddev, self.model.vocab_size, name="moe")
            update_BLD, router_state = moe(
                h_BLD, step, router_state, preference_BE, chosen_BLK, x_BLD
            )
            if dense_BLD is not None:
                update_BLD = dense_BLD + self._norm("moe_norm_after")(update_BLD)
        else:
            assert_never(ffn)
        return self._added(update_BLD, "ffn_norm_after"), router_state

    def _dense_beside(self, config: DenseConfig, h_BLD: jax.Array, depth_scale: float) -> jax.Array:
        """What the dense layer beside the experts adds to theirs."""
        out_BLD = SwiGLU(config, depth_scale * config.d_ff**-0.5, name="ffn")(h_BLD)
        return self._norm("dense_norm_after")(out_BLD)

    def _read(self, x_BLD: jax.Array, name: str) -> jax.Array:
        """What a branch reads of the residual stream."""
        if self.spec.norms == "post":
            return x_BLD
        return self._norm(name)(x_BLD)

    def _norm(self, name: str) -> RMSNorm:
        model = self.model
        return RMSNorm(model.norm_eps, is_zero_centered=model.zero_centered_norms, name=name)

    def _added(self, update_BLD: jax.Array, name: str) -> jax.Array:
        """What a branch's result adds to the residual stream."""
        if self.spec.norms != "pre":
            update_BLD = self._norm(name)(update_BLD)
        scale = self.model.residual_scale
        return update_BLD if scale == 1.0 else scale * update_BLD


_TracedOnce = nn.jit(Block)
"""Equal layers share one trace and one function of the program: thirty with weights of their own
(model/unstacked.py) are traced in a sixth of the time."""


class Period(nn.Module):
    """The pattern's layers once: what the scan repeats.

    With model.early_exit, sows its result as "hidden" into the collection "exits".
    """

    model: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, tuple[BlockState, ...] | None],
        stacked: tuple[BlockState, ...] | None,
        step: Step,
        is_dropped_B: jax.Array | None = None,
        preference: Preference | None = None,
        chosen: ChosenExperts | None = None,
        vectors_BLNW: jax.Array | None = None,
        read: dict[int, Shareable] | None = None,
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """Rows with is_dropped are given back as they came.

        Args:
          carry: x_BLD, and the layers' states where they are not stacked (ModelState.is_stacked).
          stacked: the states of this period, where they are.
          vectors_BLNW: of this period's layers (model/per_layer_embeddings.py).
          read: what sources in the prefix have read, by number.
        """
        x_BLD, own = carry
        states = stacked if own is None else own
        before_BLD, after = x_BLD, []
        if is_dropped_B is not None:  # padding: no expert works on it, no router counts it
            is_row_B1 = is_dropped_B[:, None]
            step = step.replace(positions_BL=jnp.where(is_row_B1, -1, step.positions_BL))
        # Inside a function of its own, a layer would draw other values from the same seed.
        is_drawing = self.is_initializing() and not self.has_rng(SHAPES_ALONE)
        has_equals = len(set(self.model.pattern)) < len(self.model.pattern)
        kind = _TracedOnce if has_equals and not is_drawing else Block
        first, last = step.layers or (0, len(self.model.pattern))
        sources, num_prefix, read = self.model.key_sources, len(self.model.prefix), dict(read or {})
        for i, spec in enumerate(self.model.pattern):
            layer_state = None if states is None else states[i]
            if first <= i < last:
                number = num_prefix + i
                is_source = number in sources
                block = kind(spec, self.model, self.execution, is_source, name=f"layer_{i}")
                wanted_BE = None if preference is None else preference.get(f"layer_{i}")
                chosen_BLK = None if chosen is None else chosen.get(f"layer_{i}")
                vectors_BLW = None if vectors_BLNW is None else vectors_BLNW[:, :, i]
                given = GivenToBlock.of(vectors_BLW, sources[number], read)
                new_BLD, layer_state, made = block(
                    x_BLD, step, layer_state, wanted_BE, chosen_BLK, given
                )
                if made is not None:
                    read[number] = made
                x_BLD = _keep_exited(step, x_BLD, new_BLD)
            after.append(layer_state)
        if is_dropped_B is not None:
            x_BLD = jnp.where(is_dropped_B[:, None, None], before_BLD, x_BLD)
        if self.model.early_exit is not None:
            self.sow("exits", "hidden", x_BLD, init_fn=lambda: None, reduce_fn=newest)
        if states is None:
            return (x_BLD, None), None
        return ((x_BLD, None), tuple(after)) if own is None else ((x_BLD, tuple(after)), None)


def _keep_exited(step: Step, old_BLD: jax.Array, new_BLD: jax.Array) -> jax.Array:
    if step.is_exited_BL is None:
        return new_BLD
    is_exited = step.is_exited_BL.reshape(*old_BLD.shape[:2], *[1] * (old_BLD.ndim - 2))
    return jnp.where(is_exited, old_BLD, new_BLD)
