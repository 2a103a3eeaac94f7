"""Which keys a query of latent attention sees (DeepSeek-V3.2's sparse attention, 2025).

A small attention of its own scores the keys before a query,

    I_ls = sum over h of w_lh * relu(q_lh . k_s / sqrt(C)) / sqrt(H)

and the query sees those with the best top_k scores. One key k per token serves all heads and is
cached. The published code also turns q and k by a Hadamard matrix, which no product of the two
shows, and rounds them to fp8; neither is done here.

Layers after it may see the same keys without scores of their own (GLM-5.2): see ChosenKeys.

B batch, L queries, T queries of all rows, S keys, K chosen keys, N queries of a piece, D d_model,
Q query_rank, H heads (the indexer's, or the attention's), C head_dim, W width of values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.attention import LatentAttentionConfig
from kernels.cached_attention import cached_attention
from kernels.window_attention import visible
from kernels.window_attention.reference import MASKED
from model.layer_state import AnyKeyValueState, KeyValueState, gather_sequences
from model.layers import LayerNorm, rope, weight
from model.step import Step

KEY_NORM_EPS = 1e-6
QUERIES_AT_ONCE = 16
"""Whose chosen keys are gathered together."""
QUERIES_OF_LOSS = 128
"""Whose attention weights are made together for the indexer's loss."""


class Index(NamedTuple):
    """What the tokens ask and what they offer."""

    q_BLHC: jax.Array
    k_BLC: jax.Array
    weights_BLH: jax.Array
    """float32, how much each head counts, 1 / sqrt(H C) in it."""


class ChosenKeys(NamedTuple):
    """The keys that queries see: layers with `shares_indexer` see the same, each its own keys of
    those places. All None where no key is left out."""

    mask_BLS: jax.Array | None = None
    """bool, of the step's own tokens, where its queries read these."""
    place_BLK: jax.Array | None = None
    """int32, of a state, where they read that: which keys of it, flattened, 0 where there are
    none. One and the same place in each layer's state."""
    positions_BLK: jax.Array | None = None
    """int32, theirs; -1 where there are none."""


class Indexer(nn.Module):
    """Queries from the latent that the attention's own queries come from, keys from the token.

    The first rope_head_dim entries of both are turned by the attention's frequencies.
    """

    attention: LatentAttentionConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, h_BLQ: jax.Array, positions_BL: jax.Array) -> Index:
        c, d_model, dtype = self.attention.indexer, x_BLD.shape[-1], x_BLD.dtype
        assert c is not None
        q_shape, query_rank = (c.num_heads, c.head_dim), h_BLQ.shape[-1]
        w_q_QHC = weight(
            self, "q", (query_rank, *q_shape), ("embed", "heads", "head_dim"), query_rank**-0.5
        )
        w_k_DC = weight(self, "k", (d_model, c.head_dim), ("embed", "head_dim"), d_model**-0.5)
        w_DH = weight(self, "weights", (d_model, c.num_heads), ("embed", "heads"), d_model**-0.5)
        q_BLHC = jnp.einsum("BLQ,QHC->BLHC", h_BLQ, w_q_QHC.astype(dtype))
        k_BLC = jnp.einsum("BLD,DC->BLC", x_BLD, w_k_DC.astype(dtype))
        k_BLC = LayerNorm(KEY_NORM_EPS, name="k_norm")(k_BLC)
        weights_BLH = jnp.einsum("BLD,DH->BLH", x_BLD, w_DH.astype(dtype)).astype(jnp.float32)
        return Index(
            self._turned(q_BLHC, positions_BL),
            self._turned(k_BLC[:, :, None], positions_BL)[:, :, 0],
            weights_BLH * (c.num_heads * c.head_dim) ** -0.5,
        )

    def _turned(self, x_BLHC: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.attention
        with_BLHP, without_BLHN = jnp.split(x_BLHC, [c.rope_head_dim], axis=-1)
        with_BLHP = rope(with_BLHP, positions_BL, c.rope_base, c.rope_scaling)
        return jnp.concatenate([with_BLHP, without_BLHN], axis=-1)


def chosen_keys(index: Index, k_BSC: jax.Array, visible_BLS: jax.Array, top_k: int) -> jax.Array:
    """The visible keys with each query's best top_k scores, bool [B, L, S]; all of them where there
    are no more. Of equal scores the first keys are chosen.

    Scores are float32 and take [B, L, H, S] of memory: read long texts in pieces.
    """
    if k_BSC.shape[1] <= top_k:
        return visible_BLS
    scores_BLS = jnp.where(visible_BLS, key_scores(index, k_BSC), -jnp.inf)
    least_BL1 = jax.lax.top_k(scores_BLS, top_k)[0][:, :, -1:]
    is_above_BLS, is_equal_BLS = scores_BLS > least_BL1, scores_BLS == least_BL1
    room_BL1 = top_k - is_above_BLS.sum(axis=-1, keepdims=True)
    is_first_BLS = jnp.cumsum(is_equal_BLS, axis=-1) <= room_BL1
    return visible_BLS & (is_above_BLS | (is_equal_BLS & is_first_BLS))


def key_scores(index: Index, k_BSC: jax.Array) -> jax.Array:
    """I_ls of the module's first lines, float32 [B, L, S]."""
    products_BLHS = jnp.einsum(
        "BLHC,BSC->BLHS", index.q_BLHC, k_BSC, preferred_element_type=jnp.float32
    )
    return jnp.einsum("BLHS,BLH->BLS", jax.nn.relu(products_BLHS), index.weights_BLH)


def imitation_loss(
    q_BLHC: jax.Array, k_BSHC: jax.Array, index: Index, mask_BLS: jax.Array
) -> jax.Array:
    """Mean over tokens of KL(p || softmax(I)) over the keys that a query sees, nats, float32 []:
    how the indexer learns (DeepSeek-V3.2, 2025). p is the attention's own weights, summed over its
    heads and scaled to sum to 1, a constant.

    A block of queries is made at a time: the weights take [B, H, block, S] of memory.

    Args:
      q_BLHC, k_BSHC: the attention's, each head's own.
      mask_BLS: the keys that the query sees, those that the indexer chose.
    """
    batch, length, heads, width = q_BLHC.shape
    block = min(QUERIES_OF_LOSS, length)
    q_BLHC, k_BSHC = jax.lax.stop_gradient((q_BLHC * width**-0.5, k_BSHC))
    scores_BLS = key_scores(index, index.k_BLC)

    def block_loss(rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BMHC, scores_BMS, mask_BMS = rows
        weights_BHMS = jnp.einsum(
            "BMHC,BSHC->BHMS", q_BMHC, k_BSHC, preferred_element_type=jnp.float32
        )
        weights_BHMS = jnp.where(mask_BMS[:, None], weights_BHMS, -jnp.inf)
        sees_BM = mask_BMS.any(axis=-1)
        p_BMS = jax.nn.softmax(jnp.where(sees_BM[:, None, :, None], weights_BHMS, 0.0)).sum(axis=1)
        p_BMS = jnp.where(mask_BMS, p_BMS / heads, 0.0)
        guess_BMS = jax.nn.log_softmax(jnp.where(mask_BMS, scores_BMS, MASKED), axis=-1)
        log_p_BMS = jnp.log(jnp.where(p_BMS > 0, p_BMS, 1.0))
        kl_BM = jnp.where(p_BMS > 0, p_BMS * (log_p_BMS - guess_BMS), 0.0).sum(axis=-1)
        return jnp.where(sees_BM, kl_BM, 0.0).sum()

    def cut(x_BL: jax.Array) -> jax.Array:
        x_BL = jnp.pad(x_BL, ((0, 0), (0, -length % block), *[(0, 0)] * (x_BL.ndim - 2)))
        return x_BL.reshape(batch, -1, block, *x_BL.shape[2:]).swapaxes(0, 1)

    total = jax.lax.map(
        jax.checkpoint(block_loss), jax.tree.map(cut, (q_BLHC, scores_BLS, mask_BLS))
    )
    count = mask_BLS.any(axis=-1).sum(dtype=jnp.float32)
    return total.sum() / jnp.maximum(count, 1.0)


def chosen_slots(index: Index, state: AnyKeyValueState, step: Step, top_k: int) -> ChosenKeys:
    """The top_k keys of its sequence in the state that each token scores best. Of equal scores the
    first keys are chosen.

    All keys of the indexer are read: where the sequence is long, these are most of the bytes of a
    token (docs/experiments.md says where it begins to pay).
    """

    def piece(queries: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_NHC, weights_NH, position_N, row_N = queries
        k_NSC, positions_NS, place_NS = gather_sequences(state, step, row_N)
        is_seen_NS = visible(position_N[:, None], positions_NS, window_size=None, num_sink_tokens=0)
        as_rows = Index(q_NHC[:, None], k_NSC, weights_NH[:, None])
        scores_NS = key_scores(as_rows, k_NSC)[:, 0]
        best_NK, slot_NK = jax.lax.top_k(jnp.where(is_seen_NS, scores_NS, -jnp.inf), top_k)
        is_key_NK = best_NK > -jnp.inf
        place_NK = jnp.where(is_key_NK, jnp.take_along_axis(place_NS, slot_NK, axis=1), 0)
        positions_NK = jnp.where(is_key_NK, jnp.take_along_axis(positions_NS, slot_NK, axis=1), -1)
        return place_NK, positions_NK

    rows = (index.q_BLHC, index.weights_BLH, step.positions_BL, step.state_rows())
    place_BLK, positions_BLK = _in_pieces(piece, rows)
    return ChosenKeys(place_BLK=place_BLK, positions_BLK=positions_BLK)


def attend_chosen(
    q_BLHC: jax.Array,
    chosen: ChosenKeys,
    state: AnyKeyValueState,
    step: Step,
    *,
    scale: float,
    value_width: int,
) -> jax.Array:
    """Attention of each token over these keys of the state, and over nothing else: [B, L, H, W]."""
    k, scales = _flat_keys(state)

    def piece(queries: tuple[jax.Array, ...]) -> jax.Array:
        q_NHC, place_NK, positions_NK, position_N = queries
        return cached_attention(
            q_NHC,
            k[place_NK],
            None,
            jnp.arange(len(q_NHC), dtype=jnp.int32),
            position_N,
            positions_NK,
            k_scales_RSG=None if scales is None else scales[place_NK],
            scale=scale,
            value_width=value_width,
            one_per_row=True,
        )

    rows = (q_BLHC, chosen.place_BLK, chosen.positions_BLK, step.positions_BL)
    return _in_pieces(piece, rows)


def _in_pieces(piece: Callable[[Any], Any], rows_BL: Any) -> Any:
    """piece of QUERIES_AT_ONCE queries at a time, one after the other; the last are padded.

    Args:
      piece: of arrays [N, ...] to arrays [N, ...].
      rows_BL: arrays [B, L, ...].
    """
    batch, length = jax.tree.leaves(rows_BL)[0].shape[:2]
    count, size = batch * length, QUERIES_AT_ONCE

    def cut(x_T: jax.Array) -> jax.Array:
        x_T = jnp.pad(x_T, ((0, -count % size), *[(0, 0)] * (x_T.ndim - 1)), mode="edge")
        return x_T.reshape(-1, size, *x_T.shape[1:])

    rows_T = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), rows_BL)
    if count <= size:
        out_T = piece(rows_T)
    else:
        pieces = jax.lax.map(piece, jax.tree.map(cut, rows_T))
        out_T = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], pieces)
    return jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), out_T)


def _flat_keys(state: AnyKeyValueState) -> tuple[jax.Array, jax.Array | None]:
    """The attention's keys of all slots one after the other, [slots, 1, C], and their scales."""
    if isinstance(state, KeyValueState):
        k, scales = state.k_RSGC, state.k_scales_RSG
    else:
        k, scales = state.k_PZGC, state.k_scales_PZG
    k = k.reshape(-1, *k.shape[2:])
    return k, None if scales is None else scales.reshape(-1, scales.shape[-1])
