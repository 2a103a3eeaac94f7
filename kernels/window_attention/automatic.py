"""window_attention by the native CPU kernels in programs for the CPU, by XLA in others.

The platform is known when the program is lowered, not when it is traced: a program for a GPU
cluster can be planned on a machine that has only a CPU.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels.window_attention import cpu, xla
from kernels.window_attention.cpu import Operands, Reach


def window_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None,
    gaps: bool,
) -> jax.Array:
    """Returns the attention of each row over the visible rows of its segment, [B, L, H, W]."""
    sinks_H = jnp.zeros((0,), jnp.float32) if sink_logits_H is None else sink_logits_H
    operands = Operands(q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL, sinks_H)
    return _attention(Reach(window_size, num_sink_tokens, gaps), operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(reach: Reach, operands: Operands) -> jax.Array:
    return _run(reach, operands)[0]


def _forward(reach: Reach, operands: Operands):
    out_BLHW, log_sums_BLH = _run(reach, operands)
    return out_BLHW, (operands, out_BLHW, log_sums_BLH)


def _backward(reach: Reach, residuals, d_out_BLHW):
    dq, dk, dv, dsinks = lax.platform_dependent(
        *residuals,
        d_out_BLHW,
        cpu=partial(cpu.backward, reach),
        default=partial(_plain_backward, reach),
    )
    return (Operands(dq, dk, dv, None, None, dsinks),)  # type: ignore[arg-type]


_attention.defvjp(_forward, _backward)


def _run(reach: Reach, operands: Operands) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(
        operands, cpu=partial(cpu.forward, reach), default=partial(_plain_forward, reach)
    )


def _plain(reach: Reach, q_BLHC, k_BLGC, v_BLGW, sinks_H, positions_BL, segments_BL) -> jax.Array:
    return xla.window_attention(
        q_BLHC,
        k_BLGC,
        v_BLGW,
        positions_BL,
        segments_BL,
        sink_logits_H=sinks_H if sinks_H.size else None,
        **reach._asdict(),
    )


def _plain_forward(reach: Reach, operands: Operands) -> tuple[jax.Array, jax.Array]:
    q, k, v, positions, segments, sinks = operands
    out_BLHW = _plain(reach, q, k, v, sinks, positions, segments)
    return out_BLHW, jnp.zeros(q.shape[:3], jnp.float32)  # only the native backward reads it


def _plain_backward(reach: Reach, operands: Operands, out_BLHW, log_sums_BLH, d_out_BLHW):
    q, k, v, positions, segments, sinks = operands

    def plain(q, k, v, sinks):
        return _plain(reach, q, k, v, sinks, positions, segments)

    _, pull = jax.vjp(plain, q, k, v, sinks)
    return pull(d_out_BLHW)
