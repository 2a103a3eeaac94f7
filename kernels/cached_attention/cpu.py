"""cached_attention by the native CPU kernels (kernels/native/src/cached_attention.cc).

Keys and values are read as they are stored. T tokens, H query heads, C head_dim, W width of values.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import native
from kernels.cached_attention.state import Options, State

STORED = (jnp.float32, jnp.bfloat16, jnp.int8)


def unsupported_reason(q_THC: jax.Array, state: State) -> str | None:
    """Why the native kernels can't attend with these operands; None where they can."""
    if q_THC.dtype != jnp.float32:
        return f"the CPU kernels attend in float32, q is {q_THC.dtype}"
    for x in (state.k, state.v):
        if x is not None and x.dtype not in STORED:
            return f"the CPU kernels read float32, bfloat16 and int8, and the state is {x.dtype}"
    return None


def cached_attention(
    q_THC: jax.Array,
    rows_T: jax.Array,
    positions_T: jax.Array,
    state: State,
    sink_logits_H: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Returns the attention of each token over its row's slots, float32 [T, H, W]."""
    none = jnp.zeros((0,), jnp.float32)
    is_latent = state.v is None
    places = state.slot_positions_RS if state.tables_RN is None else state.tables_RN
    assert places is not None
    return native.call(
        "moesaic_cached_attention",
        jax.ShapeDtypeStruct((*q_THC.shape[:2], options.value_width), jnp.float32),
        q_THC,
        state.k,
        none if state.v is None else state.v,
        none if state.k_scales is None else state.k_scales,
        none if state.v_scales is None else state.v_scales,
        rows_T,
        positions_T,
        places.astype(jnp.int32),
        none if sink_logits_H is None else sink_logits_H.astype(jnp.float32),
        is_paged=state.tables_RN is not None,
        window=options.window_size or 0,
        num_sinks=options.num_sink_tokens,
        value_width=options.value_width if is_latent else 0,
        scale=np.float32(options.scale),
    )
