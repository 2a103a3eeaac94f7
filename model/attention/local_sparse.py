"""Grouped-query attention with RoPE over a window and O(log n) places before it.

Two kinds of far sight behind one config: the tokens at powers of two back and the document's first
(LogSparse, Li et al. 2019), or summaries, one learned pooling of keys and values for each of log n
dyadic buckets. kernels/sparse_attention defines both. With a state, whose slot is the position, the
new tokens are written first and then look only at the slots and summaries they need.

B batch, L length, S slots, D d_model, H query heads, G key/value heads, C head_dim.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from flax import struct

from configs.attention import LocalSparseAttentionConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from kernels.quantize import MatrixDims
from kernels.sparse_attention import (
    Nodes,
    cached_power_attention,
    cached_summary_attention,
    empty_nodes,
    power_attention,
    rebuilt,
    summary_attention,
    updated,
)
from model.layer_state import KeyValueState, RowsFirst, StateShape, key_value_state
from model.layers import parameter, project, rope, weight
from model.step import Step

SLOT_IS_POSITION = "sparse attention finds tokens by their slot, which is their position"


class PowersState(KeyValueState):
    """A slot for each token."""

    unpageable_reason: ClassVar[str | None] = SLOT_IS_POSITION
    unmixable_reason: ClassVar[str | None] = SLOT_IS_POSITION


class SummaryState(RowsFirst, struct.PyTreeNode):
    """The tokens, a slot for each, and the summaries of those before the window."""

    unrewindable_reason: ClassVar[str | None] = "a summary holds tokens that would leave"
    unpageable_reason: ClassVar[str | None] = SLOT_IS_POSITION
    unmixable_reason: ClassVar[str | None] = SLOT_IS_POSITION

    tokens: KeyValueState
    nodes: Nodes
    """Of all whole aligned blocks of slots, and of 2, 4, 8, ... of them, float32."""

    def rewind(self, length_R: jax.Array) -> "SummaryState":
        raise NotImplementedError(self.unrewindable_reason)

    def logical_axes(self) -> Any:
        nodes = Nodes(("batch", None, None), *[("batch", None, None, None)] * 2)  # type: ignore[arg-type]
        return self.replace(tokens=self.tokens.logical_axes(), nodes=nodes)


def init_state(config: LocalSparseAttentionConfig, shape: StateShape) -> Any:
    """A slot for each token, and room for the summaries."""
    heads, width = config.num_kv_heads, config.head_dim
    if shape.dtype == "int8":
        raise UserError("sparse attention has no int8 keys: leave --kv at bfloat16 or float32")
    tokens = key_value_state(
        shape._replace(num_pages=None), heads=heads, widths=(width, width), kind=PowersState
    )
    if config.block_size is None:
        return tokens
    assert isinstance(tokens, KeyValueState)
    dims = (*shape.stack, shape.num_rows)
    nodes = empty_nodes(dims, shape.max_length, config.block_size, heads, width, width)
    return SummaryState(tokens, nodes)


def visible_keys(config: LocalSparseAttentionConfig, places: np.ndarray) -> np.ndarray:
    """Those of the window, and one for each doubling of the distance beyond it."""
    near = np.minimum(places, config.window_size)
    return near + np.log2(np.maximum(places / config.window_size, 1))


def mixing_flops(config: LocalSparseAttentionConfig, places: np.ndarray) -> float:
    """Scores and values: two per key, head and channel of each."""
    keys = float(visible_keys(config, places).mean())
    return 2.0 * (keys * config.num_heads * 2 * config.head_dim)


class LocalSparseAttention(nn.Module):
    """Attention over the tokens of the same document, or over a state that holds them."""

    config: LocalSparseAttentionConfig
    execution: ExecutionConfig
    out_stddev: float

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: KeyValueState | SummaryState | None,
    ) -> tuple[jax.Array, KeyValueState | SummaryState | None]:
        c, d_model = self.config, x_BLD.shape[-1]
        q_shape, kv_shape = (c.num_heads, c.head_dim), (2, c.num_kv_heads, c.head_dim)
        q_axes, kv_axes = ("heads", "head_dim"), (None, "kv_heads", "head_dim")
        stddev, o_axes = d_model**-0.5, (*q_axes, "embed")
        w_q_DHC = weight(
            self, "q", (d_model, *q_shape), ("embed", *q_axes), stddev, MatrixDims(1, 2)
        )
        w_kv_D2GC = weight(
            self, "kv", (d_model, *kv_shape), ("embed", *kv_axes), stddev, MatrixDims(1, 3)
        )
        w_o_HCD = weight(self, "o", (*q_shape, d_model), o_axes, self.out_stddev, MatrixDims(2, 1))
        q_BLHC = project("BLD,DHC->BLHC", x_BLD, w_q_DHC)
        kv_BL2GC = project("BLD,DiGC->BLiGC", x_BLD, w_kv_D2GC)
        q_BLHC = rope(q_BLHC, step.positions_BL, c.rope_base)
        k_BLGC, v_BLGC = rope(kv_BL2GC[:, :, 0], step.positions_BL, c.rope_base), kv_BL2GC[:, :, 1]
        attend = {"summaries": self._over_summaries, "powers_of_two": self._over_powers}[c.far]
        if state is not None and step.rows_BL is not None:
            raise NotImplementedError(f"{SLOT_IS_POSITION}: give each sequence a row of tokens")
        out_BLHC, state = attend(q_BLHC, k_BLGC, v_BLGC, step, state)
        return project("BLHC,HCD->BLD", out_BLHC, w_o_HCD, is_flat=state is not None), state

    def _over_powers(
        self,
        q_BLHC: jax.Array,
        k_BLGC: jax.Array,
        v_BLGC: jax.Array,
        step: Step,
        state: KeyValueState | SummaryState | None,
    ) -> tuple[jax.Array, KeyValueState | None]:
        c = self.config
        reach = {"window_size": c.window_size, "num_sink_tokens": c.num_sink_tokens}
        if state is None:
            rows = (step.positions_BL, step.segments_BL)
            chosen = self.execution.sparse_attention
            return power_attention(
                q_BLHC, k_BLGC, v_BLGC, *rows, implementation=chosen, **reach
            ), None
        assert isinstance(state, KeyValueState)
        state = state.write(step, k_BLGC, v_BLGC)
        k_BSGC, v_BSGC = (x.astype(q_BLHC.dtype) for x in (state.k_RSGC, state.v_RSGW))
        out_BLHC = cached_power_attention(
            q_BLHC, k_BSGC, v_BSGC, step.positions_BL, state.positions_RS, **reach
        )
        return out_BLHC, state

    def _over_summaries(
        self,
        q_BLHC: jax.Array,
        k_BLGC: jax.Array,
        v_BLGC: jax.Array,
        step: Step,
        state: KeyValueState | SummaryState | None,
    ) -> tuple[jax.Array, SummaryState | None]:
        c = self.config
        assert c.block_size is not None
        # All zeros pools by the mean; each head's own keys then pull its vector apart.
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("kv_heads", "head_dim"))
        pool_GC = parameter(self, "pool", init, k_BLGC.shape[2:])
        reach = {"window_size": c.window_size, "block_size": c.block_size}
        if state is None:
            rows = (step.positions_BL, step.segments_BL)
            chosen = self.execution.sparse_attention
            return summary_attention(
                q_BLHC, k_BLGC, v_BLGC, pool_GC, *rows, implementation=chosen, **reach
            ), None
        assert isinstance(state, SummaryState)
        tokens, positions_BL = state.tokens.write(step, k_BLGC, v_BLGC), step.positions_BL
        k_BSGC, v_BSGC = tokens.k_RSGC, tokens.v_RSGW
        if positions_BL.shape[1] == 1:
            nodes = updated(state.nodes, k_BSGC, v_BSGC, pool_GC, positions_BL[:, 0], c.block_size)
        else:
            nodes = rebuilt(k_BSGC, v_BSGC, pool_GC, c.block_size)
        k_BSGC, v_BSGC = (x.astype(q_BLHC.dtype) for x in (k_BSGC, v_BSGC))
        out_BLHC = cached_summary_attention(
            q_BLHC, k_BSGC, v_BSGC, nodes, positions_BL, tokens.positions_RS, **reach
        )
        return out_BLHC, SummaryState(tokens, nodes)
