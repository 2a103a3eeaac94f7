"""Grouped-query attention with RoPE, a sliding window, sink tokens and learned sink logits; biases,
normed and bounded queries and keys, and a gate on the result where public models have them.

B batch, L length, S keys, D d_model, H query heads, G key/value heads, C head_dim.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.attention import AttentionConfig, QKNorm, QueryTemperatureConfig
from configs.base import ExecutionConfig
from kernels.quantize import MatrixDims
from model.attention.none import EmptyState
from model.attention.sharded import sharded_cached_attention, sharded_window_attention
from model.layer_state import AnyKeyValueState, StateShape, key_value_state
from model.layers import RMSNorm, project, rope, unscaled_rms_norm, weight, zero_weight
from model.step import Step

QUERY_AXES, KEY_AXES = ("heads", "head_dim"), ("kv_heads", "head_dim")
NORMED_DIMS: dict[QKNorm, int] = {"head": 1, "all": 2, "head_unscaled": 0}
"""Last dimensions of queries and keys that have a norm's scale each."""


class ReadKeys(NamedTuple):
    """What a layer's queries read: later layers with `shares_keys` read it too."""

    k_BLGC: jax.Array
    v_BLGC: jax.Array
    """Of the step's tokens, as they are scored."""
    state: AnyKeyValueState | None
    """With these tokens."""


def init_state(config: AttentionConfig, shape: StateShape) -> AnyKeyValueState | EmptyState:
    """A slot for each token, or a ring of what the window still sees; nothing of a layer that reads
    another's."""
    if config.shares_keys:
        return EmptyState()
    return key_value_state(
        shape,
        heads=config.num_kv_heads,
        widths=(config.head_dim, config.head_dim),
        window_size=config.chunk_size or config.window_size,
        num_sink_tokens=config.num_sink_tokens,
    )


def visible_keys(config: AttentionConfig, places: np.ndarray) -> np.ndarray:
    """Those of the window, and the sink tokens before it; or of the chunk."""
    if config.chunk_size is not None:
        return (places - 1) % config.chunk_size + 1
    if config.window_size is None:
        return places
    near = np.minimum(places, config.window_size)
    return np.minimum(places, near + config.num_sink_tokens)


def mixing_flops(config: AttentionConfig, places: np.ndarray) -> float:
    """Scores and values: two per key, head and channel of each."""
    keys = float(visible_keys(config, places).mean())
    return 2.0 * (keys * config.num_heads * 2 * config.head_dim)


class GroupedQueryAttention(nn.Module):
    """Attention over the tokens of the same document, or over a state that holds them.

    With config.shares_keys, queries alone, over what an earlier layer's queries read.
    """

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
        step: Step,
        state: AnyKeyValueState | EmptyState | None,
        source: ReadKeys | None = None,
    ) -> tuple[jax.Array, Any, ReadKeys]:
        """The result, the state, and what the queries read.

        Args:
          source: what those of the layer read that config.shares_keys means.
        """
        c, d_model = self.config, x_BLD.shape[-1]
        q_BLHC, k_BLGC, v_BLGC = self._projected(x_BLD)
        out_axis = None if self.out_features else "embed"
        out_shape = (c.num_heads, c.head_dim, self.out_features or d_model)
        w_o_HCD = weight(
            self, "o", out_shape, (*QUERY_AXES, out_axis), self.out_stddev, MatrixDims(2, 1)
        )
        q_BLHC, k_BLGC, v_BLGC = self._normed_and_bounded(q_BLHC, k_BLGC, v_BLGC, step)
        if c.rope_scaling is not None:
            q_BLHC *= c.rope_scaling.logit_scale
        if c.query_temperature is not None:
            q_BLHC *= _growth(step.positions_BL, c.query_temperature).astype(q_BLHC.dtype)
        if c.score_scale is not None:  # kernels multiply scores by head_dim^-0.5
            q_BLHC *= c.score_scale * c.head_dim**0.5
        sink_logits_H = None
        if c.sink_logits:  # they start as if one more key had the score 0
            sink_logits_H = zero_weight(self, "sink_logits", (c.num_heads,), ("heads",))
        if source is None:
            assert not c.shares_keys
            assert not isinstance(state, EmptyState)
            written = None if state is None else state.write(step, k_BLGC, v_BLGC)
            source = ReadKeys(k_BLGC, v_BLGC, written)
            state = written
        out_BLHC = self._attended(q_BLHC, source, step, sink_logits_H)
        if c.output_gate:
            out_BLHC *= self._gates(x_BLD)
        out_BLD = project("BLHC,HCD->BLD", out_BLHC, w_o_HCD, is_flat=state is not None)
        if c.bias and c.output_bias:
            o_bias_D = zero_weight(self, "o_bias", out_shape[2:], (out_axis,))
            out_BLD += o_bias_D.astype(out_BLD.dtype)[None, None]
        return out_BLD, state, source

    def _projected(self, x_BLD: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Queries [B, L, H, C], keys and values [B, L, G, C], biases added; None of what the layer
        has not."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        q_shape, kv_shape = (c.num_heads, c.head_dim), (2, c.num_kv_heads, c.head_dim)
        kv_axes = (None, *KEY_AXES)
        stddev, q_axes = d_model**-0.5, ("embed", *QUERY_AXES)
        w_q_DHC = weight(self, "q", (d_model, *q_shape), q_axes, stddev, MatrixDims(1, 2))
        if c.shares_keys:
            q_BLHC = project("BLD,DHC->BLHC", x_BLD, w_q_DHC)
            if c.bias:
                q_BLHC += zero_weight(self, "q_bias", q_shape, QUERY_AXES).astype(dtype)[None, None]
            return q_BLHC, None, None
        if c.values_from_keys:
            shape, axes = (d_model, *kv_shape[1:]), ("embed", *KEY_AXES)
            w_k_DGC = weight(self, "k", shape, axes, stddev, MatrixDims(1, 2))
            k_BLGC = project("BLD,DGC->BLGC", x_BLD, w_k_DGC)
            return project("BLD,DHC->BLHC", x_BLD, w_q_DHC), k_BLGC, k_BLGC
        w_kv_D2GC = weight(
            self, "kv", (d_model, *kv_shape), ("embed", *kv_axes), stddev, MatrixDims(1, 3)
        )
        q_BLHC = project("BLD,DHC->BLHC", x_BLD, w_q_DHC)
        kv_BL2GC = project("BLD,DiGC->BLiGC", x_BLD, w_kv_D2GC)
        if c.bias:
            q_BLHC += zero_weight(self, "q_bias", q_shape, QUERY_AXES).astype(dtype)[None, None]
            bias_2GC = zero_weight(self, "kv_bias", kv_shape, kv_axes).astype(dtype)
            kv_BL2GC += bias_2GC[None, None]
        return q_BLHC, kv_BL2GC[:, :, 0], kv_BL2GC[:, :, 1]

    def _gates(self, x_BLD: jax.Array) -> jax.Array:
        """Factors of the heads' results, between 0 and 1: [B, L, H, C]."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        shape = (c.num_heads, c.head_dim)
        axes, dims = ("embed", *QUERY_AXES), MatrixDims(1, 2)
        w_DHC = weight(self, "gate", (d_model, *shape), axes, d_model**-0.5, dims)
        gates_BLHC = project("BLD,DHC->BLHC", x_BLD, w_DHC)
        if c.bias:
            bias_HC = zero_weight(self, "gate_bias", shape, QUERY_AXES)
            gates_BLHC += bias_HC.astype(dtype)[None, None]
        return jax.nn.sigmoid(gates_BLHC.astype(jnp.float32)).astype(dtype)

    def _normed_and_bounded(
        self, q_BLHC: jax.Array, k_BLGC: Any, v_BLGC: Any, step: Step
    ) -> tuple[jax.Array, Any, Any]:
        """The same three with norm, bound and RoPE."""
        c = self.config
        if c.value_norm and v_BLGC is not None:
            v_BLGC = unscaled_rms_norm(v_BLGC, self.norm_eps)
        if not c.qk_norm_after_rope:
            q_BLHC, k_BLGC = self._normed(q_BLHC, k_BLGC)
        own: tuple[Any, ...] = (q_BLHC, k_BLGC, v_BLGC)
        if c.clip_qkv is not None:
            own = tuple(None if x is None else jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in own)
        q_BLHC, k_BLGC, v_BLGC = own
        q_BLHC = _turned(q_BLHC, step.positions_BL, c)
        k_BLGC = None if k_BLGC is None else _turned(k_BLGC, step.positions_BL, c)
        if c.qk_norm_after_rope:
            q_BLHC, k_BLGC = self._normed(q_BLHC, k_BLGC)
        return q_BLHC, k_BLGC, v_BLGC

    def _normed(self, q_BLHC: jax.Array, k_BLGC: Any) -> tuple[jax.Array, Any]:
        q_BLHC = self._normed_heads(q_BLHC, QUERY_AXES, "q_norm")
        return q_BLHC, None if k_BLGC is None else self._normed_heads(k_BLGC, KEY_AXES, "k_norm")

    def _normed_heads(self, x_BLHC: jax.Array, axes: tuple[str, str], name: str) -> jax.Array:
        qk_norm = self.config.qk_norm
        if qk_norm is None:
            return x_BLHC
        normed, eps = NORMED_DIMS[qk_norm], self.norm_eps
        if not normed:
            return unscaled_rms_norm(x_BLHC, eps)
        is_zero_centered = self.config.zero_centered_qk_norm
        return RMSNorm(eps, axes[-normed:], is_zero_centered, name=name)(x_BLHC)

    def _attended(
        self,
        q_BLHC: jax.Array,
        source: ReadKeys,
        step: Step,
        sink_logits_H: jax.Array | None,
    ) -> jax.Array:
        """Each head's sum of values, [B, L, H, C]."""
        c = self.config
        reach = {
            "window_size": c.window_size,
            "num_sink_tokens": c.num_sink_tokens,
            "score_cap": c.score_cap,
        }
        if source.state is not None and not step.is_whole:
            form = {"sink_logits_H": sink_logits_H, "chunk_size": c.chunk_size, **reach}
            return sharded_cached_attention(q_BLHC, source.state, step, **form)
        positions_BL, segments_BL = step.positions_BL, step.segments_BL
        if c.chunk_size is not None:
            positions_BL, segments_BL = _in_chunks(positions_BL, segments_BL, c.chunk_size)
        return sharded_window_attention(
            q_BLHC,
            source.k_BLGC,
            source.v_BLGC,
            positions_BL,
            segments_BL,
            sink_logits_H=sink_logits_H,
            gaps=self.gaps,
            implementation=self.execution.window_attention,
            **reach,
        )


def _growth(positions_BL: jax.Array, config: QueryTemperatureConfig) -> jax.Array:
    """What queries at these positions are multiplied by, float32 [B, L, 1, 1]."""
    first = 1 if config.counts_itself else 0
    steps_BL = jnp.maximum(positions_BL + first, 0) // config.length
    growth_BL = 1.0 + config.growth * jnp.log1p(steps_BL.astype(jnp.float32))
    return growth_BL[:, :, None, None]


def _in_chunks(
    positions_BL: jax.Array, segments_BL: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Positions within chunks, and each chunk of a segment as a segment of its own."""
    chunks_BL = positions_BL // chunk_size
    is_new_BL = segments_BL[:, 1:] != segments_BL[:, :-1]
    is_new_BL |= chunks_BL[:, 1:] != chunks_BL[:, :-1]
    own_BL = jnp.pad(jnp.cumsum(is_new_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return jnp.where(positions_BL < 0, positions_BL, positions_BL % chunk_size), own_BL


def _turned(x_BLHC: jax.Array, positions_BL: jax.Array, config: AttentionConfig) -> jax.Array:
    """Heads of queries or keys with RoPE in the entries that have it."""
    base, scaling, turned = config.rope_base, config.rope_scaling, config.rotary_dim
    if turned is None:
        return rope(x_BLHC, positions_BL, base, scaling)
    if turned == 0:
        return x_BLHC
    if config.rotary_pairs == "across":
        return rope(x_BLHC, positions_BL, base, scaling, num_pairs=turned // 2)
    first_BLHC = rope(x_BLHC[..., :turned], positions_BL, base, scaling)
    return jnp.concatenate([first_BLHC, x_BLHC[..., turned:]], axis=-1)
