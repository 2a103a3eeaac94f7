"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).

One vector per token, c = norm(x W_down), holds the keys and values of all heads; a rotary key of
its own, shared by the heads, carries the position. Training and scoring make every head's keys and
values from c. With a state, the up-projections are absorbed into the query and the result instead,
so that attention runs over the kept (c, rotary key) as if over one wide key/value head:

    q_nope . (c W_uk) = (q_nope W_uk^T) . c        (sum p c) W_uv = sum p (c W_uv)

RoPE stands between query and key and can't be absorbed: that is why its part is separate.

With an indexer (model/attention/indexer.py) a query sees the keys it chooses, and no others; with
config.shares_indexer those that an earlier layer's chose.

B batch, L length, S slots, D d_model, H heads, N nope_head_dim, P rope_head_dim, W value_head_dim,
Q query_rank, R latent_rank.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.attention import LatentAttentionConfig
from configs.base import ExecutionConfig
from kernels.quantize import MatrixDims
from kernels.window_attention import masked_attention, visible
from model.attention.indexer import (
    ChosenKeys,
    Index,
    Indexer,
    attend_chosen,
    chosen_keys,
    chosen_slots,
    imitation_loss,
)
from model.attention.sharded import sharded_cached_attention, sharded_window_attention
from model.layer_state import AnyKeyValueState, StateShape, key_value_state, num_slots
from model.layers import RMSNorm, newest, project, rope, weight, zero_weight
from model.step import Step

LATENT_NORM_EPS = 1e-6
"""Of the bottlenecks' norms, whatever rms_norm_eps a model has for the others (DeepSeek's published
modelling code)."""

Pair = tuple[jax.Array, jax.Array]
"""The part without position and the part with it; of the up-projections, keys' and values'."""
PerHead = tuple[jax.Array, jax.Array, jax.Array]
"""Queries and keys [B, L, H, C], values [B, L, H, W]."""


def init_state(config: LatentAttentionConfig, shape: StateShape) -> AnyKeyValueState:
    """The latent vector and the rotary key of each token as one key, and the indexer's key."""
    return key_value_state(
        shape,
        heads=1,
        widths=(config.latent_rank + config.rope_head_dim, 0),
        index_width=config.own_indexer and config.own_indexer.head_dim,
    )


def visible_keys(config: LatentAttentionConfig, places: np.ndarray) -> np.ndarray:
    """All before the query, or those that an indexer chooses."""
    return places if config.indexer is None else np.minimum(places, config.indexer.top_k)


def mixing_flops(config: LatentAttentionConfig, places: np.ndarray) -> float:
    """An indexer of the layer's own scores all keys before a query."""
    keys, widths = float(visible_keys(config, places).mean()), config.query_head_dim
    work = keys * config.num_heads * (widths + config.value_head_dim)
    if config.own_indexer is not None:
        work += places.mean() * config.own_indexer.num_heads * config.own_indexer.head_dim
    return 2.0 * work


class LatentAttention(nn.Module):
    """Attention over the tokens of the same document, or over a state that holds them."""

    config: LatentAttentionConfig
    execution: ExecutionConfig
    out_stddev: float

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: AnyKeyValueState | None,
        source: ChosenKeys | None = None,
    ) -> tuple[jax.Array, AnyKeyValueState | None, ChosenKeys | None]:
        """The result, the state, and the keys that an indexer chose; None without one.

        Args:
          source: those of the layer that config.shares_indexer means.
        """
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        up_shape = (c.latent_rank, c.num_heads, c.nope_head_dim + c.value_head_dim)
        up_axes = ("embed", "heads", "head_dim")
        w_up_RHC = weight(self, "kv_up", up_shape, up_axes, c.latent_rank**-0.5)
        o_shape, o_axes = (c.num_heads, c.value_head_dim, d_model), ("heads", "head_dim", "embed")
        w_o_HWD = weight(self, "o", o_shape, o_axes, self.out_stddev, MatrixDims(2, 1))
        h_BLQ = self._query_latent(x_BLD)
        queries = self._queries(h_BLQ, step.positions_BL)
        keys = self._latent(x_BLD, step.positions_BL)
        index = None
        assert (source is not None) == c.shares_indexer
        if c.own_indexer is not None:
            # It learns from its own loss alone, and no other part learns from that.
            told = jax.lax.stop_gradient((x_BLD, h_BLQ))
            index = Indexer(c, name="indexer")(*told, step.positions_BL)
        w_uk_RHN, w_uv_RHW = jnp.split(w_up_RHC.astype(dtype), [c.nope_head_dim], axis=-1)
        w_ups = (w_uk_RHN, w_uv_RHW)
        if state is not None:
            state = _write(state, step, keys, index)
        if state is None or step.is_whole:
            per_head = _per_head(queries, keys, w_ups)
            chosen = source if index is None else self._chosen_in_row(per_head, index, step)
            out_BLHW = self._over_row(per_head, chosen, step)
        else:
            chosen = source if index is None else self._chosen_in_state(index, step, state)
            out_BLHW = self._over_state(queries, chosen, w_ups, step, state)
        out_BLD = project("BLHW,HWD->BLD", out_BLHW, w_o_HWD, is_flat=state is not None)
        if c.bias:
            out_BLD += zero_weight(self, "o_bias", (d_model,), ("embed",)).astype(dtype)[None, None]
        return out_BLD, state, chosen

    def _chosen_in_row(self, per_head: PerHead, index: Index, step: Step) -> ChosenKeys:
        """The keys of each query among those of its document in the row. Sows what the indexer has
        still to learn, where one asks for it."""
        indexer, positions_BL, segments_BL = (
            self.config.indexer,
            step.positions_BL,
            step.segments_BL,
        )
        assert indexer is not None
        places = (positions_BL[:, :, None], positions_BL[:, None, :])
        mask_BLS = visible(*places, window_size=None, num_sink_tokens=0)
        mask_BLS &= segments_BL[:, :, None] == segments_BL[:, None, :]
        mask_BLS = chosen_keys(index, index.k_BLC, mask_BLS, indexer.top_k)
        if self.is_mutable_collection("router"):
            loss = imitation_loss(*per_head[:2], index, mask_BLS)
            self.sow("router", "indexer_loss", loss, init_fn=lambda: None, reduce_fn=newest)
        leaves_out = positions_BL.shape[1] > indexer.top_k
        return ChosenKeys(mask_BLS if leaves_out else None)

    def _chosen_in_state(self, index: Index, step: Step, state: AnyKeyValueState) -> ChosenKeys:
        """The keys of each query among those of its sequence in the state."""
        assert self.config.indexer is not None
        top_k = self.config.indexer.top_k
        if num_slots(state, step) <= top_k:
            return ChosenKeys()
        return chosen_slots(index, state, step, top_k)

    def _over_row(self, per_head: PerHead, chosen: ChosenKeys | None, step: Step) -> jax.Array:
        """Every head with keys and values of its own, in each document: [B, L, H, W]."""
        if chosen is not None and chosen.mask_BLS is not None:
            return masked_attention(*per_head, chosen.mask_BLS)
        rows = (step.positions_BL, step.segments_BL)
        form = self.execution.window_attention
        return sharded_window_attention(*per_head, *rows, implementation=form)

    def _over_state(
        self,
        queries: Pair,
        chosen: ChosenKeys | None,
        w_ups: Pair,
        step: Step,
        state: AnyKeyValueState,
    ) -> jax.Array:
        """One wide head over the latents of the state: [B, L, H, W]."""
        c = self.config
        (q_nope_BLHN, q_rope_BLHP), (w_uk_RHN, w_uv_RHW) = queries, w_ups
        q_latent_BLHR = jnp.einsum("BLHN,RHN->BLHR", q_nope_BLHN, w_uk_RHN)
        q_BLHC = jnp.concatenate([q_latent_BLHR, q_rope_BLHP], axis=-1)
        # Scores are divided by the root of the head's width, not of this wide query's.
        form = {"scale": c.query_head_dim**-0.5, "value_width": c.latent_rank}
        if chosen is None or chosen.place_BLK is None:
            summed_BLHR = sharded_cached_attention(q_BLHC, state, step, **form)
        else:
            summed_BLHR = attend_chosen(q_BLHC, chosen, state, step, **form)
        return jnp.einsum("BLHR,RHW->BLHW", summed_BLHR, w_uv_RHW)

    def _query_latent(self, x_BLD: jax.Array) -> jax.Array:
        """What queries are made of: their normed bottleneck [B, L, Q], or the token itself."""
        c, d_model = self.config, x_BLD.shape[-1]
        if c.query_rank is None:
            return x_BLD
        shape = (d_model, c.query_rank)
        axes = ("embed", "latent")
        w_DQ = weight(self, "q_down", shape, axes, d_model**-0.5, MatrixDims(1, 1))
        h_BLQ = project("BLD,DQ->BLQ", x_BLD, w_DQ)
        if c.bias:
            bias_Q = zero_weight(self, "q_down_bias", shape[1:], ("latent",))
            h_BLQ += bias_Q.astype(x_BLD.dtype)[None, None]
        return RMSNorm(LATENT_NORM_EPS, name="q_norm")(h_BLQ)

    def _queries(self, h_BLQ: jax.Array, positions_BL: jax.Array) -> Pair:
        """Queries without and with position, [B, L, H, N] and [B, L, H, P]."""
        c, width = self.config, h_BLQ.shape[-1]
        shape = (width, c.num_heads, c.query_head_dim)
        axes = ("embed", "heads", "head_dim")
        w_QHC = weight(self, "q", shape, axes, width**-0.5, MatrixDims(1, 2))
        q_BLHC = project("BLQ,QHC->BLHC", h_BLQ, w_QHC)
        if c.rope_scaling is not None:
            q_BLHC *= c.rope_scaling.logit_scale
        q_nope_BLHN, q_rope_BLHP = jnp.split(q_BLHC, [c.nope_head_dim], axis=-1)
        return q_nope_BLHN, self._turned(q_rope_BLHP, positions_BL)

    def _latent(self, x_BLD: jax.Array, positions_BL: jax.Array) -> Pair:
        """What is cached: the normed latent [B, L, R] and the turned rotary key [B, L, 1, P]."""
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        shape = (d_model, c.latent_rank + c.rope_head_dim)
        axes = ("embed", "latent")
        w_DC = weight(self, "kv_down", shape, axes, d_model**-0.5, MatrixDims(1, 1))
        down_BLC = project("BLD,DC->BLC", x_BLD, w_DC)
        if c.bias:
            bias_C = zero_weight(self, "kv_down_bias", shape[1:], ("latent",))
            down_BLC += bias_C.astype(dtype)[None, None]
        latent_BLR = RMSNorm(LATENT_NORM_EPS, name="kv_norm")(down_BLC[..., : c.latent_rank])
        k_rope_BL1P = down_BLC[..., None, c.latent_rank :]
        return latent_BLR, self._turned(k_rope_BL1P, positions_BL)

    def _turned(self, x_BLHP: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.config
        return rope(x_BLHP, positions_BL, c.rope_base, c.rope_scaling) if c.has_rope else x_BLHP


def _per_head(queries: Pair, keys: Pair, w_ups: Pair) -> PerHead:
    """Each head's own queries, keys and values of the row."""
    (q_nope_BLHN, q_rope_BLHP), (latent_BLR, k_rope_BL1P) = queries, keys
    w_uk_RHN, w_uv_RHW = w_ups
    k_nope_BLHN = jnp.einsum("BLR,RHN->BLHN", latent_BLR, w_uk_RHN)
    k_rope_BLHP = jnp.broadcast_to(k_rope_BL1P, q_rope_BLHP.shape)
    q_BLHC = jnp.concatenate([q_nope_BLHN, q_rope_BLHP], axis=-1)
    k_BLHC = jnp.concatenate([k_nope_BLHN, k_rope_BLHP], axis=-1)
    return q_BLHC, k_BLHC, jnp.einsum("BLR,RHW->BLHW", latent_BLR, w_uv_RHW)


def _write(
    state: AnyKeyValueState, step: Step, keys: Pair, index: Index | None
) -> AnyKeyValueState:
    """The state with latents and rotary keys beside each other."""
    latent_BLR, k_rope_BL1P = keys
    key_BL1C = jnp.concatenate([latent_BLR[:, :, None], k_rope_BL1P], axis=-1)
    return state.write(step, key_BL1C, key_BL1C[..., :0], None if index is None else index.k_BLC)
