"""The signature of paged_attention, its checks, and the choice of an implementation.

B sequences, H query heads, G key/value heads, C head_dim, W width of values, P pages of S
positions, N pages of a sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.backend import current_target, takes_triton
from kernels.paged_attention import pallas_triton, reference
from kernels.paged_attention.parts import unsupported_reason

Implementation = Literal["auto", "xla", "triton"]


def paged_attention(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    k_scales_PSG: jax.Array | None = None,
    v_scales_PSG: jax.Array | None = None,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    sink_logits_H: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns the attention of the last position of each sequence over its pages, [B, H, W].

    Position p of a sequence lies in page tables[p // S] at p % S. The query is at lengths - 1 and
    sees positions within the window, itself included, and the first num_sink_tokens: as in
    `window_attention`, with the same heads, scale and sinks.

    Args:
      q_BHC: float [B, H, C].
      k_pages_PSGC: [P, S, G, C], float or int8; H must be a multiple of G.
      v_pages_PSGW: [P, S, G, W], as the keys.
      tables_BN: int32 [B, N] in [0, P); entries past a sequence's length are not read.
      lengths_B: int32 [B], at most N * S; 0: an idle place, whose result is zero.
      k_scales_PSG, v_scales_PSG: float32 or bfloat16 [P, S, G], of int8 pages: one to a position
        and head (quantize_positions), so that appending a position leaves the others as they are.
        With C = 128 and float32 they add 1/32 to the bytes. None for float pages.
      implementation: "xla" gathers the pages into one array; "triton" is a GPU kernel that reads
        what is seen from where it lies; "auto" takes "triton" on a GPU and "xla" elsewhere
        (kernels/backend.py), when the call is traced.
    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: "triton" without a GPU that runs it, or with pages it can't read.
    Numerics: softmax in float32; float32 within 1e-5 of dense attention. int8 pages give the
      attention over what they stand for; with d the largest of |q|_1 scale_k / (2 sqrt(C)), that is
      within (exp(2 d) - 1) max|v| + max scale_v / 2 of the floats' that were rounded.
    """
    _check(q_BHC, k_pages_PSGC, v_pages_PSGW, tables_BN, lengths_B)
    check_scales(k_pages_PSGC, k_scales_PSG)
    check_scales(v_pages_PSGW, v_scales_PSG)
    operands = (q_BHC, k_pages_PSGC, v_pages_PSGW, tables_BN, lengths_B.astype(jnp.int32))
    scales = {"k_scales_PSG": k_scales_PSG, "v_scales_PSG": v_scales_PSG}
    reach = {
        "window_size": window_size,
        "num_sink_tokens": num_sink_tokens,
        "sink_logits_H": sink_logits_H,
    }
    size, widths = k_pages_PSGC.shape[1], (q_BHC.shape[-1], v_pages_PSGW.shape[3])
    can_read = unsupported_reason(size, *widths) is None
    if takes_triton(implementation) and (can_read or implementation == "triton"):
        target = current_target()
        return pallas_triton.paged_attention(*operands, **scales, **reach, target=target)
    return reference.paged_attention(*operands, **scales, **reach)


def _check(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
) -> None:
    (_, heads, width), (_, _, kv_heads, k_width) = q_BHC.shape, k_pages_PSGC.shape
    if k_width != width or v_pages_PSGW.shape[:3] != k_pages_PSGC.shape[:3]:
        raise ValueError(
            f"q {q_BHC.shape}, k {k_pages_PSGC.shape} and v {v_pages_PSGW.shape} must be "
            "[B, H, C], [P, S, G, C] and [P, S, G, W]"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key/value heads")
    check_tables(q_BHC, tables_BN, lengths_B)


def check_tables(q: jax.Array, tables_BN: jax.Array, lengths_B: jax.Array) -> None:
    """One row of pages and one length for each sequence of q."""
    if tables_BN.shape[0] != len(q) or lengths_B.shape != (len(q),):
        raise ValueError(
            f"tables {tables_BN.shape} and lengths {lengths_B.shape} must be [B, N] and [B] for q "
            f"{q.shape}"
        )


def check_scales(pages: jax.Array, scales: jax.Array | None) -> None:
    """Scales of every position and head where pages are int8, none where they are float."""
    is_int8, shape = pages.dtype == jnp.int8, None if scales is None else scales.shape
    if not is_int8 and not jnp.issubdtype(pages.dtype, jnp.floating):
        raise ValueError(f"pages are {pages.dtype}, and must be float or int8 with scales")
    if shape != (pages.shape[:-1] if is_int8 else None):
        needed = f"of shape {pages.shape[:-1]}" if is_int8 else "None"
        raise ValueError(f"pages of {pages.dtype} need scales {needed}, got {shape}")
