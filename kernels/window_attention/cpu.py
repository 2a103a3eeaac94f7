"""window_attention by the native CPU kernels (kernels/native/src/attention.cc), in float32; what
is bfloat16 is widened before and rounded behind them.

Neither scores nor masks are ever written whole: the softmax runs over chunks of keys, and the
backward pass makes the weights again from the queries' sums (Dao et al., 2022).

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import native


class Reach(NamedTuple):
    """What a row sees; see api.py."""

    window_size: int | None
    num_sink_tokens: int
    gaps: bool

    def attributes(self) -> dict[str, int | bool]:
        window = self.window_size or 0
        return {"window": window, "num_sinks": self.num_sink_tokens, "gaps": self.gaps}


class Operands(NamedTuple):
    q_BLHC: jax.Array
    k_BLGC: jax.Array
    v_BLGW: jax.Array
    positions_BL: jax.Array
    segments_BL: jax.Array
    sinks_H: jax.Array
    """Sink logits, or of shape [0] for none."""

    def as_kernels_take_them(self) -> "Operands":
        q_BLHC, k_BLGC, v_BLGW, sinks_H = (
            x.astype(jnp.float32) for x in (self.q_BLHC, self.k_BLGC, self.v_BLGW, self.sinks_H)
        )
        positions_BL, segments_BL = (
            x.astype(jnp.int32) for x in (self.positions_BL, self.segments_BL)
        )
        return Operands(q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL, sinks_H)


def forward(reach: Reach, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The attention [B, L, H, W] in q's dtype, and the log of each query's sum of exponentials
    [B, L, H], float32.

    A row that sees nothing, which is padding, gets zero.
    """
    q_BLHC, v_BLGW = operands.q_BLHC, operands.v_BLGW
    out_BLHW = jax.ShapeDtypeStruct((*q_BLHC.shape[:3], v_BLGW.shape[-1]), jnp.float32)
    log_sums_BLH = jax.ShapeDtypeStruct(q_BLHC.shape[:3], jnp.float32)
    out_BLHW, log_sums_BLH = native.call(
        "moesaic_attention_forward",
        (out_BLHW, log_sums_BLH),
        *operands.as_kernels_take_them(),
        **reach.attributes(),
    )
    return out_BLHW.astype(q_BLHC.dtype), log_sums_BLH


def backward(
    reach: Reach,
    operands: Operands,
    out_BLHW: jax.Array,
    log_sums_BLH: jax.Array,
    d_out_BLHW: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v and the sink logits, in their dtypes."""
    *rows, sinks_H = operands.as_kernels_take_them()
    out_BLHW, d_out_BLHW = (x.astype(jnp.float32) for x in (out_BLHW, d_out_BLHW))
    delta_BLH = (out_BLHW * d_out_BLHW).sum(axis=-1)
    gradients = native.call(
        "moesaic_attention_backward",
        tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands[:3]),
        *rows,
        log_sums_BLH,
        d_out_BLHW,
        delta_BLH,
        **reach.attributes(),
    )
    dsinks_H = sinks_H
    if sinks_H.size:
        # The sink's weight, exp(b - log of the sum), has no value: its score's gradient is
        # weight * (0 - delta).
        dsinks_H = -(jnp.exp(sinks_H[None, None] - log_sums_BLH) * delta_BLH).sum(axis=(0, 1))
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(gradients, operands[:3], strict=True))
    return dq, dk, dv, dsinks_H
