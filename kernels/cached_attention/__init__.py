"""interim"""

import jax
import jax.numpy as jnp

from kernels.window_attention.reference import masked_attention, visible


def cached_attention(
    q_THC,
    k,
    v,
    rows_T,
    positions_T,
    slot_positions_RS,
    *,
    k_scales_RSG=None,
    v_scales_RSG=None,
    tables_RN=None,
    window_size=None,
    num_sink_tokens=0,
    sink_logits_H=None,
    scale=None,
    value_width=None,
    one_per_row=False,
    implementation="auto",
):
    if v is None:
        v, v_scales_RSG = k[..., :value_width], k_scales_RSG

    def gather(x, s):
        if tables_RN is None:
            g = x[rows_T]
            gs = None if s is None else s[rows_T]
        else:
            t = tables_RN[rows_T]
            g = x[t]
            g = g.reshape(g.shape[0], -1, *g.shape[3:])
            gs = None if s is None else s[t].reshape(g.shape[0], -1, s.shape[-1])
        g = g.astype(jnp.float32)
        return (g if gs is None else g * gs[..., None]).astype(q_THC.dtype)

    k, v = gather(k, k_scales_RSG), gather(v, v_scales_RSG)
    if tables_RN is None:
        pos = slot_positions_RS[rows_T]
    else:
        pos = jnp.broadcast_to(jnp.arange(k.shape[1])[None], k.shape[:2])
    m = (
        visible(positions_T[:, None], pos, window_size=window_size, num_sink_tokens=num_sink_tokens)
        & (positions_T >= 0)[:, None]
    )
    v = jnp.where(m[..., None, None], v, 0)
    if scale is not None:
        q_THC = q_THC * (scale * q_THC.shape[-1] ** 0.5)
    out = masked_attention(q_THC[:, None], k, v, m[:, None], sink_logits_H)[:, 0]
    return jnp.where((positions_T >= 0)[:, None, None], out, 0)
