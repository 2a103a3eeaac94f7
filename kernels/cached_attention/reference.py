"""The definition of cached_attention: each token's row, one dense mask, one softmax.

T tokens, M tokens of one row, H query heads, G key/value heads, C head_dim, W width of values,
S slots.
"""

import jax
import jax.numpy as jnp

from kernels.cached_attention.state import Options, Row, State
from kernels.window_attention.reference import masked_attention, visible


def cached_attention(
    q_THC: jax.Array,
    rows_T: jax.Array,
    positions_T: jax.Array,
    state: State,
    sink_logits_H: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Returns softmax(scale * q k^T) v over the slots that each token sees, [T, H, W]."""

    def one(q_HC: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        slots = state.row(jnp.maximum(row, 0), options.value_width, q_HC.dtype)
        position = jnp.where(row < 0, -1, position)
        return attend(q_HC[None], position[None], slots, sink_logits_H, options)[0]

    return jax.vmap(one)(q_THC, rows_T, positions_T)


def attend(
    q_MHC: jax.Array,
    positions_M: jax.Array,
    slots: Row,
    sink_logits_H: jax.Array | None,
    options: Options,
) -> jax.Array:
    """The attention of one row's tokens over its slots, [M, H, W]; zero where nothing is seen."""
    is_seen_MS = visible(
        positions_M[:, None],
        slots.positions_S[None, :],
        window_size=options.window_size,
        num_sink_tokens=options.num_sink_tokens,
        chunk_size=options.chunk_size,
    )
    v_SGW, sees_nan_M = _finite(slots.v_SGW, is_seen_MS)
    q_MHC = q_MHC * (options.scale * q_MHC.shape[-1] ** 0.5)  # masked_attention divides by the root
    out_1MHW = masked_attention(
        q_MHC[None],
        slots.k_SGC[None],
        v_SGW[None],
        is_seen_MS[None],
        sink_logits_H,
        options.score_cap,
    )
    out_MHW = jnp.where(is_seen_MS.any(axis=1)[:, None, None], out_1MHW[0], 0)
    return jnp.where(sees_nan_M[:, None, None], jnp.nan, out_MHW)


def _finite(v_SGW: jax.Array, is_seen_MS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values that can be multiplied with weights of zero, and the tokens, [M], that see others.

    What a token does not see may be anything, and 0 * NaN would be NaN.
    """
    v_SGW = jnp.where(is_seen_MS.any(axis=0)[:, None, None], v_SGW, 0)
    if len(is_seen_MS) == 1:
        return v_SGW, jnp.zeros((1,), bool)
    is_finite_S = jnp.isfinite(v_SGW).all(axis=(1, 2))
    sees_nan_M = (is_seen_MS & ~is_finite_S[None]).any(axis=1)
    return jnp.where(is_finite_S[:, None, None], v_SGW, 0), sees_nan_M
