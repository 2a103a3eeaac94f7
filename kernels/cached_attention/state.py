"""What new tokens attend to: keys, values, their scales, and where each position lies.

R rows (sequences), S slots of a row, P pages of Z positions, N pages of a row, G key/value heads,
C head_dim, W width of values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call's operands do not say; see api.py."""

    window_size: int | None
    num_sink_tokens: int
    scale: float
    value_width: int
    one_per_row: bool
    score_cap: float | None = None
    chunk_size: int | None = None

    @property
    def unsupported_reason(self) -> str | None:
        """Why only "reference" and "xla" can attend so, in a sentence; None: all can."""
        for name in ("score_cap", "chunk_size"):
            value = getattr(self, name)
            if value is not None:
                return f"only 'xla' and 'reference' know {name}={value}: ask for 'auto' or 'xla'"
        return None


class Row(NamedTuple):
    """One row's slots side by side."""

    k_SGC: jax.Array
    v_SGW: jax.Array
    positions_S: jax.Array
    """Position -1 is an empty slot."""


class State(NamedTuple):
    """Rows of slots [R, S, ...], or pages [P, Z, ...] with the tables of the rows' pages."""

    k: jax.Array
    v: jax.Array | None
    """None: values are the first entries of the one key head."""
    k_scales: jax.Array | None
    v_scales: jax.Array | None
    slot_positions_RS: jax.Array | None
    tables_RN: jax.Array | None

    @property
    def num_rows(self) -> int:
        places = self.slot_positions_RS if self.tables_RN is None else self.tables_RN
        assert places is not None
        return places.shape[0]

    def row(self, row: jax.Array, value_width: int, dtype: jnp.dtype) -> Row:
        """The slots of one row, of which int8 ones became floats; pages in the table's order."""
        if self.tables_RN is not None:
            page_N = self.tables_RN[row]
            count = page_N.shape[0] * self.k.shape[1]
            positions_S = jnp.arange(count, dtype=jnp.int32)
            at = page_N
        else:
            assert self.slot_positions_RS is not None
            positions_S = self.slot_positions_RS[row]
            at = row

        def side_by_side(x: jax.Array, scales: jax.Array | None) -> jax.Array:
            slots = x[at]
            if scales is not None:
                scale = scales[at][..., None].astype(jnp.float32)
                slots = slots.astype(jnp.float32) * scale
            return slots.reshape(positions_S.shape[0], *x.shape[2:]).astype(dtype)

        k_SGC = side_by_side(self.k, self.k_scales)
        if self.v is None:
            return Row(k_SGC, k_SGC[..., :value_width], positions_S)
        return Row(k_SGC, side_by_side(self.v, self.v_scales), positions_S)
