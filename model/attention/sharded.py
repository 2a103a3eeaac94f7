"""Attention kernels on every device's own rows and heads.

B batch, L rows, T tokens, R rows of a state, S slots, H query heads, G key/value heads, C head_dim,
W width of values.
"""

import functools

import jax

from kernels.cached_attention import cached_attention
from kernels.window_attention import Implementation, window_attention
from model.layer_state import AnyKeyValueState, KeyValueState
from model.step import Step
from parallel.sharding import on_shards

QUERY_AXES = ("batch", "length", "heads", "head_dim")
KEY_AXES = ("batch", "length", "kv_heads", "head_dim")
ROW_AXES = ("batch", "length")


def sharded_window_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    sink_logits_H: jax.Array | None = None,
    score_cap: float | None = None,
    gaps: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """As kernels.window_attention, [B, L, H, W]; with a mesh in use each device attends for its
    rows of the batch and its heads.
    """
    attend = functools.partial(
        window_attention,
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        score_cap=score_cap,
        gaps=gaps,
        implementation=implementation,
    )
    operands = [q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL]
    axes = [QUERY_AXES, KEY_AXES, KEY_AXES, ROW_AXES, ROW_AXES]
    if sink_logits_H is None:
        return on_shards(attend, operands, axes, QUERY_AXES)

    def attend_with_sinks(*operands):
        return attend(*operands[:-1], sink_logits_H=operands[-1])

    return on_shards(attend_with_sinks, [*operands, sink_logits_H], [*axes, ("heads",)], QUERY_AXES)


def sharded_cached_attention(
    q_BLHC: jax.Array,
    state: AnyKeyValueState,
    step: Step,
    *,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    sink_logits_H: jax.Array | None = None,
    scale: float | None = None,
    value_width: int | None = None,
    score_cap: float | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """As kernels.cached_attention, [B, L, H, W], over the state of each token's row, which holds
    the step's tokens already.

    With a mesh in use each device attends for its heads, and where a row of tokens has a row of the
    state to itself, for its rows of the batch.
    """
    is_dense = isinstance(state, KeyValueState)
    batch = "batch" if is_dense and step.rows_BL is None else None
    if is_dense:
        k, v, scales = state.k_RSGC, state.v_RSGW, (state.k_scales_RSG, state.v_scales_RSG)
    else:
        k, v, scales = state.k_PZGC, state.v_PZGW, (state.k_scales_PZG, state.v_scales_PZG)
    named = {
        "q": (q_BLHC, (batch, None, "heads", None)),
        "k": (k, (batch, None, "kv_heads", None)),
        "v": (None if value_width else v, (batch, None, "kv_heads", None)),
        "k_scales": (scales[0], (batch, None, "kv_heads")),
        "v_scales": (scales[1], (batch, None, "kv_heads")),
        "positions": (step.positions_BL, (batch, None)),
        "slot_positions": (state.positions_RS if is_dense else None, (batch, None)),
        "rows": (step.rows_BL, (None, None)),
        "tables": (None if is_dense else step.tables_RN, (None, None)),
        "sink_logits": (sink_logits_H, ("heads",)),
    }
    present = {name: pair for name, pair in named.items() if pair[0] is not None}

    def attend(*operands: jax.Array) -> jax.Array:
        given = dict(zip(present, operands, strict=True))
        q_BLHC, positions_BL = given["q"], given["positions"]
        batch, length, heads, width = q_BLHC.shape
        rows_BL = given.get("rows", jax.lax.broadcasted_iota(jax.numpy.int32, (batch, length), 0))
        out_THW = cached_attention(
            q_BLHC.reshape(batch * length, heads, width),
            given["k"],
            given.get("v"),
            rows_BL.reshape(-1),
            positions_BL.reshape(-1),
            given.get("slot_positions"),
            k_scales_RSG=given.get("k_scales"),
            v_scales_RSG=given.get("v_scales"),
            tables_RN=given.get("tables"),
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            sink_logits_H=given.get("sink_logits"),
            scale=scale,
            value_width=value_width,
            score_cap=score_cap,
            chunk_size=chunk_size,
            one_per_row=length == 1 and "rows" not in given,
        )
        return out_THW.reshape(batch, length, heads, -1)

    operands, axes = zip(*present.values(), strict=True)
    return on_shards(attend, operands, axes, (batch, None, "heads", None))
