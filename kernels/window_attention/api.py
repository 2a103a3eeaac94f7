"""The signature of window_attention, its checks, and the choice of an implementation.

B batch, L rows, H query heads, G key/value heads, C head_dim, W width of values (C in most models).
"""

from typing import Literal, assert_never

import jax

from kernels import native
from kernels.backend import current_target, prefers_mosaic, require_mosaic, takes_triton
from kernels.window_attention import automatic, pallas_mosaic, pallas_triton, reference, xla

Implementation = Literal["auto", "reference", "xla", "cpu", "triton", "mosaic"]


def window_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None = None,
    score_cap: float | None = None,
    gaps: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns causal attention of each row over the rows of its own segment, [B, L, H, W].

    A row at position i sees those at j with 0 <= i - j < window_size, and the segment's first
    num_sink_tokens. Head h uses key/value head h // (H / G). Scores are divided by sqrt(C).

    Args:
      q_BLHC: float [B, L, H, C].
      k_BLGC: float [B, L, G, C]; H must be a multiple of G.
      v_BLGW: float [B, L, G, W].
      positions_BL: int32, the row's position in its segment, rising by one inside it; a negative
        position is padding: no row sees it, and its own result is unspecified but finite.
      gaps: positions rise inside a segment, but may skip some, and padding may lie between its rows
        (the tokens that a layer of a Mixture-of-Depths works on).
      segments_BL: int32, equal for the rows of one document, which must be contiguous.
      window_size: rows visible to a query, itself included; None means all before it.
      num_sink_tokens: first positions of a segment that stay visible; 0 without a window.
      sink_logits_H: float32 [H], a logit of each query head that joins its softmax and has no value
        (gpt-oss, 2025); None for none.
      score_cap: what keeps scores within +-score_cap: score_cap * tanh(score / score_cap) (Gemma 2,
        2024); None for none. "reference" and "xla" alone do it, and "auto" takes "xla" then.
      implementation: "reference" makes the whole [L, L] score matrix; "xla" skips blocks of keys
        that no query of a block can see; "cpu" is C++ that never writes scores out, in float32;
        "triton" is a GPU kernel; "mosaic" is one for Hopper alone (bfloat16, heads of 64 or 128
        channels), with the gradients of "triton"; "auto" takes "mosaic" or "triton", whichever was
        measured to be faster (kernels/backend.py), or "cpu", where it runs, and "xla" elsewhere.
    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: the implementation asked for can't do this here.
    Numerics: softmax in float32; float32 within 1e-5 of the reference.
    """
    _check(q_BLHC, k_BLGC, v_BLGW, sink_logits_H)
    rows = (q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL)
    reach = {
        "window_size": window_size,
        "num_sink_tokens": num_sink_tokens,
        "sink_logits_H": sink_logits_H,
    }
    if implementation == "reference":  # goes by the values of positions alone
        return reference.window_attention(*rows, **reach, score_cap=score_cap)
    if score_cap is not None:
        if implementation not in ("auto", "xla"):
            raise NotImplementedError(
                f"implementation={implementation!r} does not cap scores (score_cap={score_cap}): "
                "ask for 'auto' or 'xla'"
            )
        return xla.window_attention(*rows, **reach, gaps=gaps, score_cap=score_cap)
    if implementation == "cpu" and q_BLHC.dtype not in native.FLOATS:
        raise NotImplementedError(
            f"the CPU kernels attend in float32 or bfloat16, q is {q_BLHC.dtype}: cast it"
        )
    if implementation == "mosaic":
        return pallas_mosaic.window_attention(*rows, **reach, target=require_mosaic())
    if takes_triton(implementation) or implementation == "triton":
        target = current_target()
        can_mosaic = pallas_mosaic.unsupported_reason(q_BLHC, v_BLGW, target) is None
        if implementation == "auto" and can_mosaic and prefers_mosaic("window_attention", target):
            return pallas_mosaic.window_attention(*rows, **reach, target=target)
        return pallas_triton.window_attention(*rows, **reach, target=target)
    if implementation == "cpu" or (
        implementation == "auto" and native.is_used_for(q_BLHC, native.FLOATS)
    ):
        return automatic.window_attention(*rows, **reach, gaps=gaps)
    if implementation == "auto" or implementation == "xla":
        return xla.window_attention(*rows, **reach, gaps=gaps)
    assert_never(implementation)


def _check(
    q_BLHC: jax.Array, k_BLGC: jax.Array, v_BLGW: jax.Array, sink_logits_H: jax.Array | None
) -> None:
    batch, length, heads, width = q_BLHC.shape
    kv_heads = k_BLGC.shape[2]
    fits = k_BLGC.shape == (batch, length, kv_heads, width)
    if not fits or v_BLGW.shape[:3] != (batch, length, kv_heads):
        raise ValueError(
            f"q {q_BLHC.shape}, k {k_BLGC.shape} and v {v_BLGW.shape} must be [B, L, H, C], "
            "[B, L, G, C] and [B, L, G, W]"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key/value heads")
    if sink_logits_H is not None and sink_logits_H.shape != (heads,):
        raise ValueError(
            f"sink_logits {sink_logits_H.shape} must be one per query head, ({heads},)"
        )
