"""window_attention on every device's own rows and heads.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values.
"""

import functools

import jax

from kernels.window_attention import Implementation, window_attention
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
