"""The signature of paged_attention, its checks, and the choice of an implementation.

B sequences, H query heads, G key/value heads, C head_dim, W width of values, P pages of S
positions, N pages of a sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.backend import current_target, takes_triton
from kernels.paged_attention import pallas_triton, reference

Implementation = Literal["auto", "xla", "triton"]


def paged_attention(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    window_size: int | None = None,
    num_sinks: int = 0,
    sink_logits_H: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns the attention of the last position of each sequence over its pages, [B, H, W].

    Position p of a sequence lies in page tables[p // S] at p % S. The query is at lengths - 1 and
    sees positions within the window, itself included, and the first num_sinks: as in
    `window_attention`, with the same heads, scale and sinks.

    Args:
      q_BHC: float [B, H, C].
      k_pages_PSGC: float [P, S, G, C]; H must be a multiple of G.
      v_pages_PSGW: float [P, S, G, W].
      tables_BN: int32 [B, N] in [0, P); entries past a sequence's length are not read.
      lengths_B: int32 [B], at most N * S; 0: an idle place, whose result is zero.
      implementation: "xla" gathers the pages into one array; "triton" is a GPU kernel that reads
        what is seen from where it lies; "auto" takes "triton" on a GPU and "xla" elsewhere
        (kernels/backend.py), when the call is traced.
    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: "triton" without a GPU that runs it, or with pages it can't read.
    Numerics: softmax in float32; float32 within 1e-5 of dense attention.
    """
    (_, heads, width), (_, _, kv_heads, k_width) = q_BHC.shape, k_pages_PSGC.shape
    if k_width != width or v_pages_PSGW.shape[:3] != k_pages_PSGC.shape[:3]:
        raise ValueError(
            f"q {q_BHC.shape}, k {k_pages_PSGC.shape} and v {v_pages_PSGW.shape} must be "
            "[B, H, C], [P, S, G, C] and [P, S, G, W]"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key/value heads")
    if tables_BN.shape[0] != len(q_BHC) or lengths_B.shape != (len(q_BHC),):
        raise ValueError(
            f"tables {tables_BN.shape} and lengths {lengths_B.shape} must be [B, N] and [B] for q "
            f"{q_BHC.shape}"
        )
    operands = (q_BHC, k_pages_PSGC, v_pages_PSGW, tables_BN, lengths_B.astype(jnp.int32))
    reach = {"window_size": window_size, "num_sinks": num_sinks, "sink_logits_H": sink_logits_H}
    size, widths = k_pages_PSGC.shape[1], (width, v_pages_PSGW.shape[3])
    can_read = pallas_triton.lacks(size, *widths) is None
    if takes_triton(implementation) and (can_read or implementation == "triton"):
        return pallas_triton.paged_attention(*operands, **reach, target=current_target())
    return reference.paged_attention(*operands, **reach)
