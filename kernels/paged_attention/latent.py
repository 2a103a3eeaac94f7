"""The signature of paged_latent_attention, its checks, and the choice of an implementation.

B sequences, H query heads, R latent_rank, P rope_head_dim, Z pages of S positions, N pages of a
sequence.
"""

import jax
import jax.numpy as jnp

from kernels.backend import current_target, takes_triton
from kernels.paged_attention import pallas_triton_latent, reference
from kernels.paged_attention.api import Implementation, check_scales, check_tables
from kernels.paged_attention.parts import unsupported_reason


def paged_latent_attention(
    q_latent_BHR: jax.Array,
    q_rope_BHP: jax.Array,
    latent_pages_ZSR: jax.Array,
    rope_pages_ZSP: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    latent_scales_ZS: jax.Array | None = None,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns sum_j p_j c_j of each head over the positions that a sequence's last one sees.

    The decoding form of multi-head latent attention (DeepSeek-V2, 2024, section 2.1.2): with the
    up-projections absorbed, p = softmax(scale * (q_latent . c_j + q_rope . k_rope_j)), and the
    result [B, H, R], float of q's dtype, is what each head's value projection takes. Tables,
    lengths, window and sinks are those of `paged_attention`.

    Args:
      q_latent_BHR: float [B, H, R], each head's query times its key up-projection.
      q_rope_BHP: [B, H, P], turned by its position.
      latent_pages_ZSR: [Z, S, R], float or int8: one latent c of a position for all heads.
      rope_pages_ZSP: float [Z, S, P], the turned rotary key of a position for all heads.
      tables_BN: int32 [B, N] in [0, Z).
      lengths_B: int32 [B], at most N * S; 0: an idle place, whose result is zero.
      scale: of the scores: 1 / sqrt(nope_head_dim + rope_head_dim) unless the model says otherwise;
        it can't be told from the shapes here.
      latent_scales_ZS: float32 or bfloat16 [Z, S], of int8 pages (quantize_positions). The rotary
        keys, an eighth of the channels and the ones that tell positions apart, stay float.
      implementation: as in `paged_attention`.
    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: "triton" without a GPU that runs it, or with pages it can't read.
    Numerics: softmax in float32; float32 within 1e-5 of dense attention.
    """
    _check(q_latent_BHR, q_rope_BHP, latent_pages_ZSR, rope_pages_ZSP)
    check_tables(q_latent_BHR, tables_BN, lengths_B)
    check_scales(latent_pages_ZSR, latent_scales_ZS)
    q_rope_BHP = q_rope_BHP.astype(q_latent_BHR.dtype)
    pages = (latent_pages_ZSR, rope_pages_ZSP, tables_BN, lengths_B.astype(jnp.int32))
    operands = (q_latent_BHR, q_rope_BHP, *pages)
    reach = {"window_size": window_size, "num_sink_tokens": num_sink_tokens}
    settings = {"latent_scales_ZS": latent_scales_ZS, "scale": scale, **reach}
    widths = (latent_pages_ZSR.shape[-1], rope_pages_ZSP.shape[-1])
    can_read = unsupported_reason(latent_pages_ZSR.shape[1], *widths) is None
    if takes_triton(implementation) and (can_read or implementation == "triton"):
        target = current_target()
        return pallas_triton_latent.paged_latent_attention(*operands, **settings, target=target)
    return reference.paged_latent_attention(*operands, **settings)


def _check(
    q_latent_BHR: jax.Array,
    q_rope_BHP: jax.Array,
    latent_pages_ZSR: jax.Array,
    rope_pages_ZSP: jax.Array,
) -> None:
    same = (
        (q_latent_BHR.shape[:2], q_rope_BHP.shape[:2]),
        (latent_pages_ZSR.shape[:2], rope_pages_ZSP.shape[:2]),
        (q_latent_BHR.shape[2:], latent_pages_ZSR.shape[2:]),
        (q_rope_BHP.shape[2:], rope_pages_ZSP.shape[2:]),
    )
    if q_latent_BHR.ndim != 3 or any(ours != theirs for ours, theirs in same):
        raise ValueError(
            f"q_latent {q_latent_BHR.shape}, q_rope {q_rope_BHP.shape}, latent pages "
            f"{latent_pages_ZSR.shape} and rope pages {rope_pages_ZSP.shape} must be [B, H, R], "
            "[B, H, P], [Z, S, R] and [Z, S, P]"
        )
