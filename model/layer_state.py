"""What layers keep of the tokens they have read: one kind of state for each kind of layer.

Every kind answers the same questions (LayerState): it takes new tokens (in the kind's own terms),
goes back to a length, gives the state of some sequences away and takes it back, and names its axes
for mesh and planner. The kinds that most attentions share are here, others lie beside theirs;
model/model_state.py puts a model's together.

B rows of tokens, L new tokens, R rows of the state (sequences), S slots, P pages of Z positions,
M tokens of memory, G key/value heads, C head_dim, W width of values, D d_model, N rows taken.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from kernels.paged_attention import quantize_positions
from model.step import Step


class LayerState(Protocol):
    """What every kind of state can do, or says that it can't."""

    unrewindable_reason: ClassVar[str | None]
    """Why tokens can't be taken back, in a sentence; None: they can, as many as are spare."""
    unpageable_reason: ClassVar[str | None]
    """Why a model with it can't have pages that sequences share, in a sentence; None: it lies in
    them, or in rows of its own beside the pages of other layers."""
    unmixable_reason: ClassVar[str | None]
    """Why a row of tokens must belong to one sequence, in a sentence; None: it may be of several
    (Step.rows_BL)."""

    def rewind(self, length_R: jax.Array) -> Self:
        """The state without the tokens from these positions on."""
        ...

    def take(self, rows_N: jax.Array) -> Self:
        """The state of these sequences alone: a snapshot, or the beginning of others."""
        ...

    def put(self, rows_N: jax.Array, taken: Self) -> Self:
        """The state with that of these sequences replaced by what `take` gave."""
        ...

    def logical_axes(self) -> Any:
        """The names of each array's dimensions (parallel/sharding.py), in a tree like this one."""
        ...


class StateShape(NamedTuple):
    """How much a layer's state must hold."""

    num_rows: int
    """Sequences, R."""
    max_length: int
    """Tokens of a sequence at most."""
    dtype: str
    """Of keys and values: float32, bfloat16 or int8."""
    spare: int = 0
    """Tokens that may be written and taken back (`rewind`), or one less than are written at once,
    without loss to a window."""
    num_pages: int | None = None
    """Pages that all sequences share, page 0 among them; None: each has slots of its own."""
    page_size: int = 64
    """Positions of a page, Z."""
    stack: tuple[int, ...] = ()
    """Dims before all others: layers that are scanned."""


class RowsFirst:
    """A state all of whose arrays have the sequences in dim 0."""

    def take(self, rows_N: jax.Array) -> Self:
        return jax.tree.map(lambda x: x[rows_N], self)

    def put(self, rows_N: jax.Array, taken: Self) -> Self:
        return jax.tree.map(lambda x, new: x.at[rows_N].set(new), self, taken)


class PagesFirst:
    """A state all of whose arrays have pages in dim 0, which sequences share; a step's table says
    whose page is which, so that what a sequence has is said by its table. Page 0 belongs to nobody,
    and takes what is not kept. What a page holds beyond a sequence's length is never seen, so that
    to rewind is to forget.
    """

    unrewindable_reason: ClassVar[str | None] = None
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = None

    def rewind(self, length_R: jax.Array) -> Self:
        """Unchanged: see the class."""
        del length_R
        return self

    def take(self, rows_N: jax.Array) -> Self:
        """Unchanged: a sequence's table is what to keep."""
        del rows_N
        return self

    def put(self, rows_N: jax.Array, taken: Self) -> Self:
        """Unchanged: see `take`."""
        del rows_N, taken
        return self

    def copy_page(self, source: jax.Array, target: jax.Array) -> Self:
        """One page copied onto another, int32 []: what two sequences shared and one will change."""
        return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), self)


class StateParts(struct.PyTreeNode):
    """A state whose fields are states, or None: what is done to it is done to each of them; what
    it can't do is said for all of them (see LayerState)."""

    unrewindable_reason: ClassVar[str | None] = None
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = None

    def map(self, fn: Callable[..., Any], *others: Any) -> Self:
        """With fn of each part, and of the others' same parts."""
        made = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            part = getattr(self, field.name)
            if part is not None:
                rest = [getattr(other, field.name) for other in others]
                is_inner = isinstance(part, StateParts)
                made[field.name] = part.map(fn, *rest) if is_inner else fn(part, *rest)
        return self.replace(**made)


class KeyValueState(RowsFirst, struct.PyTreeNode):
    """Keys (after RoPE), values and positions of each sequence's tokens, in a buffer of slots.

    With as many slots as tokens may come, position i lies in slot i. With fewer it is a ring behind
    the sink tokens, which keep the first slots for good: position i lies in slot i if i <
    num_sink_tokens, else in num_sink_tokens + (i - num_sink_tokens) mod (S - num_sink_tokens).

    Latent attention keeps its latent vector and rotary key as one key, and values of width 0. Keys
    and values may be int8, with a scale for each position and head.
    """

    unrewindable_reason: ClassVar[str | None] = None
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = None

    k_RSGC: jax.Array
    v_RSGW: jax.Array
    positions_RS: jax.Array
    """int32; -1 is an empty slot."""
    k_scales_RSG: jax.Array | None = None
    v_scales_RSG: jax.Array | None = None
    """float32, of int8 keys and values."""
    index_k_RSC: jax.Array | None = None
    """Keys of latent attention's indexer, where it has one."""
    num_sink_tokens: int = struct.field(pytree_node=False, default=0)
    longest_write: int | None = struct.field(pytree_node=False, default=None)
    """New tokens of a sequence that may be written before the first of them is read: more would
    write over keys that it still sees. None: any number, no slot is ever used twice."""

    def write(
        self,
        step: Step,
        k_BLGC: jax.Array,
        v_BLGW: jax.Array,
        index_k_BLC: jax.Array | None = None,
    ) -> "KeyValueState":
        """The state with the step's tokens in it. Padding is not written; of tokens that share a
        slot of a ring, only the newest is.

        Raises:
          ValueError: more tokens of a sequence at once than `longest_write`.
        """
        length = step.positions_BL.shape[1]
        if step.rows_BL is None and not step.is_whole and length > (self.longest_write or length):
            raise ValueError(
                f"a step of {length} tokens would write over keys that it still reads: this state "
                f"takes {self.longest_write} at once, make it with spare={length - 1}"
            )
        at = (step.state_rows(), self._slots(step))
        k, k_scales = _stored(k_BLGC, self.k_RSGC.dtype)
        v, v_scales = _stored(v_BLGW, self.v_RSGW.dtype)
        return self.replace(
            k_RSGC=_written(self.k_RSGC, at, k),
            v_RSGW=_written(self.v_RSGW, at, v) if v.size else self.v_RSGW,
            positions_RS=_written(self.positions_RS, at, step.positions_BL),
            k_scales_RSG=_written(self.k_scales_RSG, at, k_scales),
            v_scales_RSG=_written(self.v_scales_RSG, at, v_scales),
            index_k_RSC=_written(self.index_k_RSC, at, index_k_BLC),
        )

    def _slots(self, step: Step) -> jax.Array:
        """The slot of each token, int32 [B, L]; one past the end for those that are not kept."""
        slots, positions_BL = self.positions_RS.shape[-1], step.positions_BL
        if self.longest_write is None:
            return jnp.where(positions_BL >= 0, positions_BL, slots)
        sinks = self.num_sink_tokens
        ring = max(slots - sinks, 1)
        slot_BL = jnp.where(
            positions_BL < sinks, positions_BL, sinks + (positions_BL - sinks) % ring
        )
        if step.rows_BL is None:
            newest_BL = positions_BL.max(axis=1, keepdims=True)
        else:
            newest_R = jnp.full(self.positions_RS.shape[0], -1, jnp.int32)
            newest_BL = newest_R.at[step.rows_BL].max(positions_BL, mode="drop")[step.rows_BL]
        is_kept_BL = (positions_BL < sinks) | (positions_BL > newest_BL - ring)
        return jnp.where(is_kept_BL & (positions_BL >= 0), slot_BL, slots)

    def rewind(self, length_R: jax.Array) -> "KeyValueState":
        """The state without the tokens from these positions on, at most the spare ones.

        Their slots become empty; keys and values stay until they are written over.
        """
        is_past = self.positions_RS >= length_R[:, None]
        return self.replace(positions_RS=jnp.where(is_past, -1, self.positions_RS))

    def logical_axes(self) -> "KeyValueState":
        slots = ("batch", None)
        scales = None if self.k_scales_RSG is None else (*slots, "kv_heads")
        return self.replace(
            k_RSGC=(*slots, "kv_heads", None),
            v_RSGW=(*slots, "kv_heads", None),
            positions_RS=slots,
            k_scales_RSG=scales,
            v_scales_RSG=None if self.v_scales_RSG is None else scales,
            index_k_RSC=None if self.index_k_RSC is None else (*slots, None),
        )


class PagedKeyValueState(PagesFirst, struct.PyTreeNode):
    """Keys and values in pages: position p of row r is in page step.tables[r, p // Z], at p % Z."""

    k_PZGC: jax.Array
    v_PZGW: jax.Array
    k_scales_PZG: jax.Array | None = None
    v_scales_PZG: jax.Array | None = None
    index_k_PZC: jax.Array | None = None

    def write(
        self,
        step: Step,
        k_BLGC: jax.Array,
        v_BLGW: jax.Array,
        index_k_BLC: jax.Array | None = None,
    ) -> "PagedKeyValueState":
        """The pages with the step's tokens in them.

        Raises:
          ValueError: a step without tables.
        """
        if step.tables_RN is None:
            raise ValueError("a state in pages needs a step with tables: make_step(tables_RN=...)")
        num_pages, page = self.k_PZGC.shape[:2]
        position_BL = jnp.maximum(step.positions_BL, 0)
        page_BL = step.tables_RN[step.state_rows(), position_BL // page]
        page_BL = jnp.where(step.positions_BL >= 0, page_BL, num_pages)  # past the end: dropped
        at = (page_BL, position_BL % page)
        k, k_scales = _stored(k_BLGC, self.k_PZGC.dtype)
        v, v_scales = _stored(v_BLGW, self.v_PZGW.dtype)
        return self.replace(
            k_PZGC=_written(self.k_PZGC, at, k),
            v_PZGW=_written(self.v_PZGW, at, v) if v.size else self.v_PZGW,
            k_scales_PZG=_written(self.k_scales_PZG, at, k_scales),
            v_scales_PZG=_written(self.v_scales_PZG, at, v_scales),
            index_k_PZC=_written(self.index_k_PZC, at, index_k_BLC),
        )

    def logical_axes(self) -> "PagedKeyValueState":
        positions = (None, None)
        scales = None if self.k_scales_PZG is None else (*positions, "kv_heads")
        return self.replace(
            k_PZGC=(*positions, "kv_heads", None),
            v_PZGW=(*positions, "kv_heads", None),
            k_scales_PZG=scales,
            v_scales_PZG=None if self.v_scales_PZG is None else scales,
            index_k_PZC=None if self.index_k_PZC is None else (*positions, None),
        )


AnyKeyValueState = KeyValueState | PagedKeyValueState


def key_value_state(
    shape: StateShape,
    *,
    heads: int,
    widths: tuple[int, int],
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    index_width: int | None = None,
    kind: type[KeyValueState] = KeyValueState,
) -> AnyKeyValueState:
    """An empty state; a layer with a window keeps a ring of what it still sees, unless in pages.

    Args:
      kind: of the state, where it is not in pages.
      widths: of a key and of a value.
      index_width: of an indexer's key; None without one.
    """
    seen = shape.max_length if window_size is None else num_sink_tokens + window_size + shape.spare
    is_ring = shape.num_pages is None and seen < shape.max_length
    slots = min(seen, shape.max_length)
    dims = (shape.num_rows, slots)
    if shape.num_pages is not None:
        dims = (shape.num_pages, shape.page_size)
    dims, is_int8 = (*shape.stack, *dims), shape.dtype == "int8"
    scales = jnp.zeros((*dims, heads), jnp.float32) if is_int8 else None
    index_dtype = "float32" if is_int8 else shape.dtype
    arrays = (
        jnp.zeros((*dims, heads, widths[0]), shape.dtype),
        jnp.zeros((*dims, heads, widths[1]), shape.dtype),
    )
    rest = (scales, scales if widths[1] else None)
    index_k = None if index_width is None else jnp.zeros((*dims, index_width), index_dtype)
    if shape.num_pages is not None:
        return PagedKeyValueState(*arrays, *rest, index_k)
    return kind(
        *arrays,
        jnp.full(dims, -1, jnp.int32),
        *rest,
        index_k,
        num_sink_tokens=num_sink_tokens,
        longest_write=shape.spare + 1 if is_ring else None,
    )


def num_slots(state: AnyKeyValueState, step: Step) -> int:
    """Slots of a sequence, or positions that its table has pages for."""
    if isinstance(state, KeyValueState):
        return state.positions_RS.shape[-1]
    assert step.tables_RN is not None
    return step.tables_RN.shape[1] * state.k_PZGC.shape[1]


def gather_sequences(
    state: AnyKeyValueState, step: Step, rows_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The whole of these sequences: the indexer's keys [N, S, C], the positions of their slots
    [N, S], and which key of the flattened state each slot is [N, S].
    """
    if isinstance(state, KeyValueState):
        assert state.index_k_RSC is not None
        slots = state.positions_RS.shape[-1]
        place_NS = rows_N[:, None] * slots + jnp.arange(slots)[None]
        return state.index_k_RSC[rows_N], state.positions_RS[rows_N], place_NS
    assert state.index_k_PZC is not None
    assert step.tables_RN is not None
    page_size = state.k_PZGC.shape[1]
    first_NX = step.tables_RN[rows_N] * page_size
    place_NXZ = first_NX[:, :, None] + jnp.arange(page_size)[None, None]
    place_NS = place_NXZ.reshape(len(rows_N), -1)
    index_k = state.index_k_PZC.reshape(-1, state.index_k_PZC.shape[-1])
    positions_S = jnp.arange(place_NS.shape[1], dtype=jnp.int32)
    positions_NS = jnp.broadcast_to(positions_S[None], place_NS.shape)
    return index_k.at[place_NS].get(mode="clip"), positions_NS, place_NS


def _stored(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """x as a state of this dtype holds it, and its scales if that is int8."""
    if dtype != jnp.int8 or not x.size:
        return x.astype(dtype), None
    return quantize_positions(x)


def _written(old: Any, at: tuple[jax.Array, jax.Array], new: jax.Array | None) -> Any:
    """old with new at these places; None where there is none."""
    if old is None or new is None:
        return old
    return old.at[at].set(new.astype(old.dtype), mode="drop")
