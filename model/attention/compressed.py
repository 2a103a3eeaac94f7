"""Attention over a window of tokens and over compressed entries (DeepSeek-V4, 2026).

Many query heads share one head of keys, which are its values as well. A query sees the tokens of
its window, the entries of the blocks that ended (model/attention/compression.py), all of them
(heavily compressed attention) or those that an indexer chooses (compressed sparse attention), and a
sink logit of its head, under one softmax. Keys are turned by RoPE, so the result is too: it is
turned back by the query's own position, which leaves of each value what it is at their distance.
Groups of heads have output matrices of their own, to few entries, and one matrix mixes these.

B batch, L length, S tokens of a window, E entries, D d_model, H heads, C head_dim, Q query_rank,
G groups of heads, K heads of a group, R output_rank.
"""

from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import UserError
from configs.compressed_attention import CompressedAttentionConfig
from kernels.quantize import MatrixDims
from kernels.window_attention import masked_attention, visible
from model.attention.compression import (
    Compressor,
    Entries,
    EntryState,
    entries_of,
    init_entries,
    turned,
)
from model.attention.indexer import Index, chosen_keys, imitation_loss, key_scores
from model.layer_state import KeyValueState, StateParts, StateShape, key_value_state
from model.layers import RMSNorm, newest, project, unscaled_rms_norm, weight, zero_weight
from model.step import Step, require_own_rows

QUERIES = 128
"""Queries whose scores are made together."""


class CompressedState(StateParts):
    """The tokens of the window, and the entries of what lies before."""

    unmixable_reason: ClassVar[str | None] = "compression reads a row of tokens in order"

    window: KeyValueState
    entries: EntryState | None
    index: EntryState | None
    """The indexer's own entries."""


def init_state(config: CompressedAttentionConfig, shape: StateShape) -> CompressedState:
    """A ring of tokens, and room for the entries of max_length tokens."""
    if shape.dtype == "int8":
        raise UserError("compressed attention has no int8 keys: leave --kv at bfloat16 or float32")
    window = key_value_state(
        shape._replace(num_pages=None),
        heads=1,
        widths=(config.head_dim, 0),
        window_size=config.window_size,
    )
    assert isinstance(window, KeyValueState)
    c = config.compression
    if c is None:
        return CompressedState(window, None, None)
    index = None if c.indexer is None else init_entries(c, c.indexer.head_dim, shape)
    return CompressedState(window, init_entries(c, config.head_dim, shape), index)


def visible_keys(config: CompressedAttentionConfig, places: np.ndarray) -> np.ndarray:
    """The tokens of the window and the entries, or those that an indexer chooses."""
    near, c = np.minimum(places, config.window_size), config.compression
    if c is None:
        return near
    entries = places // c.rate
    return near + (entries if c.indexer is None else np.minimum(entries, c.indexer.top_k))


def mixing_flops(config: CompressedAttentionConfig, places: np.ndarray) -> float:
    """Scores and values of what is seen; an indexer scores all entries. Making an entry takes two
    products of each of its channels and tokens, a share of which is each token's."""
    c = config.compression
    work = float(visible_keys(config, places).mean()) * config.num_heads * 2 * config.head_dim
    if c is not None:
        work += c.num_series * config.head_dim
        if c.indexer is not None:
            scored = float((places // c.rate).mean()) * c.indexer.num_heads
            work += (scored + c.num_series) * c.indexer.head_dim
    return 2.0 * work


class Queries(NamedTuple):
    """What the tokens ask."""

    q_BLHC: jax.Array
    positions_BL: jax.Array
    segments_BL: jax.Array
    asked: tuple[jax.Array, jax.Array] | None
    """Queries of the indexer's heads [B, L, I, C] and what each head counts [B, L, I]."""


class CompressedAttention(nn.Module):
    """The layer."""

    config: CompressedAttentionConfig
    norm_eps: float
    out_stddev: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, step: Step, state: CompressedState | None
    ) -> tuple[jax.Array, CompressedState | None]:
        require_own_rows(step, CompressedState.unmixable_reason)
        c, eps, d_model = self.config, self.norm_eps, x_BLD.shape[-1]
        positions_BL, segments_BL = step.positions_BL, step.segments_BL
        if state is not None:  # a row is one sequence, and its padding has no position
            segments_BL = jnp.zeros_like(segments_BL)
        w_DC = self._matrix("kv", (d_model, c.head_dim), ("embed", "head_dim"), MatrixDims(1, 1))
        k_BLC = RMSNorm(eps, ("head_dim",), name="kv_norm")(project("BLD,DC->BLC", x_BLD, w_DC))
        k_BL1C = turned(k_BLC[:, :, None], positions_BL, c)
        tokens = Entries(k_BL1C[:, :, 0], positions_BL, segments_BL)
        q_BLHC, bottleneck_BLQ = self._queries(x_BLD, positions_BL)
        queries = Queries(q_BLHC, positions_BL, segments_BL, None)
        entries = index = None
        if c.compression is not None:
            own = None if state is None else state.entries
            entries, own = Compressor(c, c.head_dim, eps, name="compressor")(x_BLD, step, own)
            if c.compression.indexer is not None:
                told = jax.lax.stop_gradient((x_BLD, bottleneck_BLQ))
                asked, index, kept = EntryIndexer(c, eps, name="indexer")(*told, step, state)
                queries = queries._replace(asked=asked)
                state = None if state is None else state.replace(index=kept)
            state = None if state is None else state.replace(entries=own)
        if state is not None:
            state = state.replace(window=state.window.write(step, k_BL1C, k_BL1C[..., :0]))
        sinks_H = zero_weight(self, "sink_logits", (c.num_heads,), ("heads",))
        if state is None or step.is_whole:
            if self.is_mutable_collection("router") and entries is not None and index is not None:
                self._sow_loss(queries, entries, index)
            seen = _Seen(tokens, entries, index, is_along=True)
        else:
            seen = _seen_of(state, step, queries, c)
        out_BLHC = _attend(queries, seen, sinks_H, c)
        out_BLHC = turned(out_BLHC, -positions_BL, c)
        return self._mixed(out_BLHC, d_model), state

    def _matrix(self, name: str, shape: Any, axes: Any, dims: MatrixDims) -> Any:
        stddev = float(np.prod(dims.split(shape)[1])) ** -0.5
        return weight(self, name, shape, axes, stddev, dims)

    def _queries(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries [B, L, H, C], and the normed bottleneck [B, L, Q] that they come from."""
        c, d_model = self.config, x_BLD.shape[-1]
        shape = (d_model, c.query_rank)
        w_DQ = self._matrix("q_down", shape, ("embed", "latent"), MatrixDims(1, 1))
        h_BLQ = RMSNorm(self.norm_eps, name="q_norm")(project("BLD,DQ->BLQ", x_BLD, w_DQ))
        shape, axes = (c.query_rank, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        w_QHC = self._matrix("q", shape, axes, MatrixDims(1, 2))
        q_BLHC = unscaled_rms_norm(project("BLQ,QHC->BLHC", h_BLQ, w_QHC), self.norm_eps)
        if c.rope_scaling is not None:
            q_BLHC *= c.rope_scaling.logit_scale
        return turned(q_BLHC, positions_BL, c), h_BLQ

    def _sow_loss(self, queries: Queries, entries: Entries, index_BEC: jax.Array) -> None:
        """How far the indexer's scores are from the attention's weights over the entries."""
        assert queries.asked is not None
        if not index_BEC.shape[1]:  # a row without a whole block
            return
        asked = Index(queries.asked[0], index_BEC, queries.asked[1])
        mask_BLE = _chosen(queries, entries, index_BEC, self.config)
        heads = (*entries.k_BEC.shape[:2], self.config.num_heads, self.config.head_dim)
        k_BEHC = jnp.broadcast_to(entries.k_BEC[:, :, None], heads)
        loss = imitation_loss(queries.q_BLHC, k_BEHC, asked, mask_BLE)
        self.sow("router", "indexer_loss", loss, init_fn=lambda: None, reduce_fn=newest)

    def _mixed(self, out_BLHC: jax.Array, d_model: int) -> jax.Array:
        """Each group of heads through its own matrix, and all of them through one."""
        c = self.config
        groups, size = c.num_output_groups, c.num_heads // c.num_output_groups
        shape = (groups, size, c.head_dim, c.output_rank)
        axes = ("latent", "latent", "head_dim", "latent")
        w_GKCR = self._matrix("o_down", shape, axes, MatrixDims(2, 1))
        x_BLGKC = out_BLHC.reshape(*out_BLHC.shape[:2], groups, size, c.head_dim)
        if isinstance(w_GKCR, jax.Array):
            h_BLGR = jnp.einsum("BLGKC,GKCR->BLGR", x_BLGKC, w_GKCR.astype(x_BLGKC.dtype))
        else:  # of few bits, or with an adapter: a matrix at a time
            matrices = [jax.tree.map(lambda a, g=g: a[g], w_GKCR) for g in range(groups)]
            parts = [project("BLKC,KCR->BLR", x_BLGKC[:, :, g], w) for g, w in enumerate(matrices)]
            h_BLGR = jnp.stack(parts, axis=2)
        w_GRD = weight(
            self,
            "o_up",
            (groups, c.output_rank, d_model),
            ("latent", "latent", "embed"),
            self.out_stddev * (c.out_width / (groups * c.output_rank)) ** 0.5,
            MatrixDims(2, 1),
        )
        return project("BLGR,GRD->BLD", h_BLGR, w_GRD)


class EntryIndexer(nn.Module):
    """What an indexer asks of the entries, and the entries that it makes for itself."""

    attention: CompressedAttentionConfig
    norm_eps: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, h_BLQ: jax.Array, step: Step, state: CompressedState | None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, EntryState | None]:
        """(queries [B, L, I, C], what each head counts, float32 [B, L, I]), its entries of the row
        [B, E, C], and the state with them."""
        c, dtype = self.attention.compression, x_BLD.dtype
        assert c is not None
        assert c.indexer is not None
        heads, width = c.indexer.num_heads, c.indexer.head_dim
        rank, d_model = h_BLQ.shape[-1], x_BLD.shape[-1]
        axes = ("embed", "heads", "head_dim")
        w_QIC = weight(self, "q", (rank, heads, width), axes, rank**-0.5).astype(dtype)
        w_DI = weight(self, "weights", (d_model, heads), axes[:2], d_model**-0.5).astype(dtype)
        q_BLIC = turned(
            jnp.einsum("BLQ,QIC->BLIC", h_BLQ, w_QIC), step.positions_BL, self.attention
        )
        counts_BLI = jnp.einsum("BLD,DI->BLI", x_BLD, w_DI).astype(jnp.float32)
        compressor = Compressor(self.attention, width, self.norm_eps, name="compressor")
        entries, kept = compressor(x_BLD, step, None if state is None else state.index)
        return (q_BLIC, counts_BLI * (heads * width) ** -0.5), entries.k_BEC, kept


class _Seen(NamedTuple):
    """What queries may see."""

    tokens: Entries
    entries: Entries | None
    index_BEC: jax.Array | None
    """The indexer's entries; None where it has chosen, or there is none."""
    is_along: bool
    """Whether the tokens lie in the queries' own columns."""


def _seen_of(
    state: CompressedState, step: Step, queries: Queries, config: CompressedAttentionConfig
) -> _Seen:
    """All of a state; for one query of each sequence the entries that it chooses alone."""
    window, c = state.window, config.compression
    k_BSC, positions_BS = window.k_RSGC[:, :, 0], window.positions_RS
    tokens = Entries(k_BSC, positions_BS, jnp.zeros_like(positions_BS))
    if c is None or state.entries is None:
        return _Seen(tokens, None, None, is_along=False)
    entries = entries_of(state.entries, step, c)
    index = None if state.index is None else entries_of(state.index, step, c).k_BEC
    is_one = queries.positions_BL.shape[1] == 1
    if c.indexer is None or index is None or not is_one or index.shape[1] <= c.indexer.top_k:
        return _Seen(tokens, entries, index, is_along=False)
    assert queries.asked is not None
    asked = Index(queries.asked[0], index.astype(queries.q_BLHC.dtype), queries.asked[1])
    is_seen_BN = _is_past(queries, entries)[:, 0]
    scores_BN = jnp.where(is_seen_BN, key_scores(asked, asked.k_BLC)[:, 0], -jnp.inf)
    best_BK, at_BK = jax.lax.top_k(scores_BN, c.indexer.top_k)
    ends_BK = jnp.take_along_axis(entries.ends_BE, at_BK, axis=1)
    chosen = Entries(
        jnp.take_along_axis(entries.k_BEC, at_BK[:, :, None], axis=1),
        jnp.where(best_BK > -jnp.inf, ends_BK, -1),
        jnp.zeros_like(ends_BK),
    )
    return _Seen(tokens, chosen, None, is_along=False)


def _is_past(queries: Queries, entries: Entries) -> jax.Array:
    """Whether a query's document has the entry and its block has ended, bool [B, L, E]."""
    ends_B1E, positions_BL1 = entries.ends_BE[:, None], queries.positions_BL[:, :, None]
    is_past = (ends_B1E >= 0) & (ends_B1E <= positions_BL1)
    return is_past & (entries.segments_BE[:, None] == queries.segments_BL[:, :, None])


def _chosen(
    queries: Queries,
    entries: Entries,
    index_BEC: jax.Array | None,
    config: CompressedAttentionConfig,
) -> jax.Array:
    """The entries that a query sees, bool [B, L, E]."""
    mask_BLE, c = _is_past(queries, entries), config.compression
    if index_BEC is None or queries.asked is None:
        return mask_BLE
    assert c is not None
    assert c.indexer is not None
    asked = Index(queries.asked[0], index_BEC.astype(queries.q_BLHC.dtype), queries.asked[1])
    return chosen_keys(asked, asked.k_BLC, mask_BLE, c.indexer.top_k)


def _attend(
    queries: Queries, seen: _Seen, sinks_H: jax.Array, config: CompressedAttentionConfig
) -> jax.Array:
    """The mean of what each query sees, [B, L, H, C]; some queries at a time."""
    length, reach = queries.positions_BL.shape[1], config.window_size - 1
    if length <= QUERIES:
        return _attend_some(queries, seen, sinks_H, config)

    def fitted(x: jax.Array, front: int, value: int) -> jax.Array:
        rest = [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, ((0, 0), (front, -length % QUERIES), *rest), constant_values=value)

    queries = Queries(
        fitted(queries.q_BLHC, 0, 0),
        fitted(queries.positions_BL, 0, -1),
        fitted(queries.segments_BL, 0, -1),
        jax.tree.map(lambda x: fitted(x, 0, 0), queries.asked),
    )
    if seen.is_along:
        k_BSC, ends_BS, segments_BS = seen.tokens
        padded = (fitted(k_BSC, reach, 0), fitted(ends_BS, reach, -1))
        seen = seen._replace(tokens=Entries(*padded, fitted(segments_BS, reach, -1)))

    def at(tree: Any, first: jax.Array, size: int) -> Any:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)  # noqa: E731
        return jax.tree.map(cut, tree)

    def piece(first: jax.Array) -> jax.Array:
        own = seen
        if seen.is_along:
            own = seen._replace(tokens=at(seen.tokens, first, QUERIES + reach))
        return _attend_some(at(queries, first, QUERIES), own, sinks_H, config)

    firsts = jnp.arange(0, length, QUERIES, dtype=jnp.int32)
    out = cast(jax.Array, jax.lax.map(jax.checkpoint(piece), firsts))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, *out.shape[3:])[:, :length]


def _attend_some(
    queries: Queries, seen: _Seen, sinks_H: jax.Array, config: CompressedAttentionConfig
) -> jax.Array:
    """The mean of what each of these queries sees."""
    tokens, dtype = seen.tokens, queries.q_BLHC.dtype
    mask_BLS = visible(
        queries.positions_BL[:, :, None],
        tokens.ends_BE[:, None],
        window_size=config.window_size,
        num_sink_tokens=0,
    )
    mask_BLS &= tokens.segments_BE[:, None] == queries.segments_BL[:, :, None]
    k_BSC = tokens.k_BEC.astype(dtype)
    if seen.entries is not None:
        mask_BLE = _chosen(queries, seen.entries, seen.index_BEC, config)
        mask_BLS = jnp.concatenate([mask_BLS, mask_BLE], axis=-1)
        k_BSC = jnp.concatenate([k_BSC, seen.entries.k_BEC.astype(dtype)], axis=1)
    k_BS1C = k_BSC[:, :, None]
    return masked_attention(queries.q_BLHC, k_BS1C, k_BS1C, mask_BLS, sinks_H)
