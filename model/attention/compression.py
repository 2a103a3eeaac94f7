"""Entries that stand for blocks of tokens (DeepSeek-V4, 2026), of a row or streamed.

Each token gives values c and gates z, one pair for its own block's entry and, where blocks overlap,
one for the next block's; b are learned and belong to the place in the block. Of m tokens of block i
(and, from the other pair, the m tokens before them)

    entry_i = RMSNorm(sum_t softmax_t(z_t + b_t) * c_t),    channel by channel

turned by RoPE at the block's first position. A query sees an entry from its block's last token on.

Streamed, a sequence keeps the values and gates of its last tokens, from which the next entry is
made, and the entries so far. An entry is made anew whenever its last token is read: taken back
tokens leave entries that nobody sees until then.

B batch (rows of the state), L length, E entries of a row, N entries of a sequence, T kept tokens,
M tokens of an entry, D d_model, S series, C width.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from configs.compressed_attention import CompressedAttentionConfig, CompressionConfig
from model.layer_state import PagesFirst, RowsFirst, StateParts, StateShape
from model.layers import RMSNorm, parameter, rope, weight
from model.step import Step, document_segments


class Entries(NamedTuple):
    """Keys that a query may see, which are values as well: entries, or tokens."""

    k_BEC: jax.Array
    ends_BE: jax.Array
    """int32, the position of the last token; -1: there is none."""
    segments_BE: jax.Array
    """int32, the document's number."""


class EntryRows(RowsFirst, struct.PyTreeNode):
    """The entries of each sequence, in places of its own."""

    unrewindable_reason: ClassVar[str | None] = None

    k_RNC: jax.Array

    def rewind(self, length_R: jax.Array) -> "EntryRows":
        """Entries stay, and are seen again when their last tokens are read again."""
        del length_R
        return self

    def written(self, step: Step, number_BE: jax.Array, k_BEC: jax.Array) -> "EntryRows":
        """With these entries in their sequences' places; those of a negative number are dropped."""
        place_BE = jnp.where(number_BE < 0, self.k_RNC.shape[1], number_BE)
        at = (_rows_of(step), place_BE)
        return EntryRows(self.k_RNC.at[at].set(k_BEC.astype(self.k_RNC.dtype), mode="drop"))

    def of_sequences(self, step: Step) -> jax.Array:
        """All places of each of the step's sequences, [B, N, C]."""
        del step
        return self.k_RNC

    def logical_axes(self) -> Any:
        return EntryRows(("batch", None, None))  # type: ignore[arg-type]


class EntryPages(PagesFirst, struct.PyTreeNode):
    """The entries of a page's positions, in pages: of Z positions Y = Z / rate."""

    k_PYC: jax.Array

    def written(self, step: Step, number_BE: jax.Array, k_BEC: jax.Array) -> "EntryPages":
        """
        Raises:
          ValueError: a step without tables.
        """
        num_pages, count, _ = self.k_PYC.shape
        number = jnp.maximum(number_BE, 0)
        page_BE = _tables(step)[_rows_of(step), number // count]
        at = (jnp.where(number_BE < 0, num_pages, page_BE), number % count)
        return EntryPages(self.k_PYC.at[at].set(k_BEC.astype(self.k_PYC.dtype), mode="drop"))

    def of_sequences(self, step: Step) -> jax.Array:
        """As EntryRows has it, as many as the table has pages for."""
        tables_BX = _tables(step)
        k_BXYC = self.k_PYC.at[tables_BX].get(mode="clip")
        return k_BXYC.reshape(len(tables_BX), -1, k_BXYC.shape[-1])

    def logical_axes(self) -> Any:
        return EntryPages((None, None, None))  # type: ignore[arg-type]


class Tail(RowsFirst, struct.PyTreeNode):
    """Values and gates of a sequence's last tokens, of which the next entries are made."""

    unrewindable_reason: ClassVar[str | None] = None

    tail_RT2SC: jax.Array
    """float32: position p in place p mod T."""

    def rewind(self, length_R: jax.Array) -> "Tail":
        """Unchanged: what was taken back is written over before it is read."""
        del length_R
        return self

    def logical_axes(self) -> Any:
        return Tail(("batch", None, None, None, None))  # type: ignore[arg-type]


class EntryState(StateParts):
    """The entries of each sequence, and what the next are made of."""

    entries: EntryRows | EntryPages
    tail: Tail


def _rows_of(step: Step) -> jax.Array:
    """The row of the state of each row of tokens, int32 [B, 1]."""
    return jnp.arange(len(step.positions_BL), dtype=jnp.int32)[:, None]


def _tables(step: Step) -> jax.Array:
    if step.tables_RN is None:
        raise ValueError("a state in pages needs a step with tables: make_step(tables_RN=...)")
    return step.tables_RN


def init_entries(config: CompressionConfig, width: int, shape: StateShape) -> EntryState:
    """No entries yet. They lie in pages where these hold whole blocks, else in rows: few stand for
    many tokens then."""
    kept, stack = num_before(config) + shape.spare + 1, shape.stack
    tail = Tail(jnp.zeros((*stack, shape.num_rows, kept, 2, config.num_series, width), jnp.float32))
    if shape.num_pages is not None and shape.page_size % config.rate == 0:
        dims = (*stack, shape.num_pages, shape.page_size // config.rate)
        return EntryState(EntryPages(jnp.zeros((*dims, width), shape.dtype)), tail)
    dims = (*stack, shape.num_rows, max(shape.max_length // config.rate, 1))
    return EntryState(EntryRows(jnp.zeros((*dims, width), shape.dtype)), tail)


def num_before(config: CompressionConfig) -> int:
    """Tokens before a token that the entry which it completes is made of."""
    return config.num_series * config.rate - 1


def entries_of(state: EntryState, step: Step, config: CompressionConfig) -> Entries:
    """All places for entries of each sequence, as of one document; ends say from when each counts.
    Places whose blocks the step's tokens don't end may hold anything, and read as 0."""
    k_BNC = state.entries.of_sequences(step)
    batch, count, _ = k_BNC.shape
    ends_N = (jnp.arange(count, dtype=jnp.int32) + 1) * config.rate - 1
    ends_BN = jnp.broadcast_to(ends_N[None], (batch, count))
    is_made_BN = ends_BN <= step.positions_BL.max(axis=1, keepdims=True)
    k_BNC = jnp.where(is_made_BN[..., None], k_BNC, 0)
    return Entries(k_BNC, ends_BN, jnp.zeros_like(ends_BN))


class Compressor(nn.Module):
    """Values, gates, and the entries made of them, for the attention's keys or an indexer's."""

    attention: CompressedAttentionConfig
    width: int
    norm_eps: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, step: Step, state: EntryState | None
    ) -> tuple[Entries, EntryState | None]:
        """The entries that end in the step's row of tokens (and some that ended before), as of one
        document, and the state with them. Without a state, those of each document of the row."""
        c, d_model = self.attention.compression, x_BLD.shape[-1]
        assert c is not None
        shape = (c.num_series, self.width)
        axes, stddev = ("embed", None, "head_dim"), d_model**-0.5
        w_kv, w_gate = (
            weight(self, name, (d_model, *shape), axes, stddev).astype(x_BLD.dtype)
            for name in ("kv", "gate")
        )
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None, "head_dim"))
        places = parameter(self, "place_bias", init, (c.rate, *shape))
        kv_BLSC, gate_BLSC = (
            jnp.einsum("BLD,DSC->BLSC", x_BLD, w).astype(jnp.float32) for w in (w_kv, w_gate)
        )
        gate_BLSC += places[step.positions_BL % c.rate]
        row = jnp.stack([kv_BLSC, gate_BLSC], axis=2)
        positions_BL, segments_BL = step.positions_BL, step.segments_BL
        if state is not None:
            row, positions_BL = _with_tail(row, positions_BL, state, num_before(c))
            segments_BL = document_segments(positions_BL)  # padding has its own
        entries = self._entries(row, positions_BL, segments_BL)
        if state is not None:
            state = _written(state, step, row, entries, c)
            entries = entries._replace(segments_BE=jnp.zeros_like(entries.segments_BE))
        return entries, state

    def _entries(
        self, row_BL2SC: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array
    ) -> Entries:
        """The entries whose blocks end in the row, from front to back; the rest is empty."""
        c = self.attention.compression
        assert c is not None
        rate, length = c.rate, positions_BL.shape[1]
        at_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], positions_BL.shape)
        is_last_BL = (positions_BL % rate == rate - 1) & (positions_BL >= 0)
        # Blocks whose first tokens lie in no row, such as before a sequence's kept ones, have none.
        is_last_BL &= (at_BL >= rate - 1) & (jnp.roll(segments_BL, rate - 1, axis=1) == segments_BL)
        last_BE = jnp.sort(jnp.where(is_last_BL, at_BL, length), axis=1)[:, : length // rate]
        is_entry_BE = last_BE < length
        last_BE = jnp.minimum(last_BE, length - 1)
        ends_BE = jnp.where(is_entry_BE, _taken(positions_BL, last_BE), -1)
        segments_BE = _taken(segments_BL, last_BE)
        before_BE = jnp.where(ends_BE >= 2 * rate - 1, segments_BE, -1)
        values, gates = self._blocks(row_BL2SC, last_BE, segments_BL, before_BE)
        k_BEC = (jax.nn.softmax(gates, axis=2) * values).sum(axis=2)
        k_BEC = RMSNorm(self.norm_eps, ("head_dim",), name="norm")(k_BEC)
        first_BE = jnp.maximum(ends_BE - (rate - 1), 0)
        k_BEC = turned(k_BEC[:, :, None], first_BE, self.attention)[:, :, 0]
        return Entries(k_BEC, ends_BE, segments_BE)

    def _blocks(
        self,
        row_BL2SC: jax.Array,
        last_BE: jax.Array,
        segments_BL: jax.Array,
        before_BE: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Values and gates of each entry's tokens, [B, E, M, C].

        Args:
          before_BE: the document of the block before; -1 where there is none.
        """
        c = self.attention.compression
        assert c is not None
        own_BEM = last_BE[:, :, None] + jnp.arange(1 - c.rate, 1, dtype=jnp.int32)[None, None]
        own = _rows(row_BL2SC[:, :, :, -1], jnp.maximum(own_BEM, 0))
        if not c.overlaps:
            return own[:, :, :, 0], own[:, :, :, 1]
        before_BEM = own_BEM - c.rate
        at_BEM = jnp.maximum(before_BEM, 0)
        before = _rows(row_BL2SC[:, :, :, 0], at_BEM)
        of_BEM = _taken(segments_BL, at_BEM.reshape(len(at_BEM), -1)).reshape(at_BEM.shape)
        is_same = (before_BEM >= 0) & (of_BEM == before_BE[:, :, None])
        gates = jnp.where(is_same[..., None], before[:, :, :, 1], -jnp.inf)
        values = jnp.concatenate([before[:, :, :, 0], own[:, :, :, 0]], axis=2)
        return values, jnp.concatenate([gates, own[:, :, :, 1]], axis=2)


def turned(
    x_BLHC: jax.Array, positions_BL: jax.Array, config: CompressedAttentionConfig
) -> jax.Array:
    """RoPE on the last rotary_dim entries of each head."""
    kept = x_BLHC.shape[-1] - config.rotary_dim
    last = rope(x_BLHC[..., kept:], positions_BL, config.rope_base, config.rope_scaling)
    return jnp.concatenate([x_BLHC[..., :kept], last], axis=-1)


def _taken(x_BL: jax.Array, at_BE: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BL, at_BE, axis=1)


def _rows(row_BL2C: jax.Array, at_BEM: jax.Array) -> jax.Array:
    """[B, E, M, 2, C]."""
    return jax.vmap(lambda row, at: row[at])(row_BL2C, at_BEM)


def _with_tail(
    row_BL2SC: jax.Array, positions_BL: jax.Array, state: EntryState, count: int
) -> tuple[jax.Array, jax.Array]:
    """The row behind the `count` tokens of the sequence before it, and the positions of both."""
    # A row's tokens come first, padding after them: causal_convolution has it so, too.
    first_B1 = jnp.maximum(positions_BL[:, :1], 0)
    before_BT = first_B1 + jnp.arange(-count, 0, dtype=jnp.int32)[None]
    tail_RT2SC = state.tail.tail_RT2SC
    place_BT = before_BT % tail_RT2SC.shape[1]
    kept = jax.vmap(lambda tail, at: tail[at])(tail_RT2SC, place_BT)
    before_BT = jnp.where((before_BT >= 0) & (positions_BL[:, :1] >= 0), before_BT, -1)
    row = jnp.concatenate([kept, row_BL2SC], axis=1)
    return row, jnp.concatenate([before_BT, positions_BL], axis=1)


def _written(
    state: EntryState, step: Step, row: jax.Array, entries: Entries, config: CompressionConfig
) -> EntryState:
    """The state with the entries that end in the step's tokens, and its newest tokens kept.

    Args:
      row: with what was kept before.
    """
    own_BL, tail_RT2SC = step.positions_BL, state.tail.tail_RT2SC
    # Of an entry that ended before, the block before its own may not be in the row.
    is_new_BE = entries.ends_BE >= jnp.maximum(own_BL[:, :1], 0)
    number_BE = jnp.where(is_new_BE, entries.ends_BE // config.rate, -1)
    kept = tail_RT2SC.shape[1]
    own = row[:, row.shape[1] - own_BL.shape[1] :]
    is_kept_BL = (own_BL >= 0) & (own_BL > own_BL.max(axis=1, keepdims=True) - kept)
    place_BL = jnp.where(is_kept_BL, own_BL % kept, kept)
    tail = tail_RT2SC.at[_rows_of(step), place_BL].set(own, mode="drop")
    return EntryState(state.entries.written(step, number_BE, entries.k_BEC), Tail(tail))
