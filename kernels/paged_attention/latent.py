"""The signature of paged_latent_attention, its checks, and the choice of an implementation.

B sequences, H query heads, C latent_rank, E rope_head_dim, P pages of S positions, N pages of a
sequence.
"""

import jax
import jax.numpy as jnp

from kernels.backend import current_target, takes_triton
from kernels.paged_attention import pallas_triton_latent, reference
from kernels.paged_attention.api import Implementation, check_scales, check_tables
from kernels.paged_attention.parts import lacks


def paged_latent_attention(
    q_latent_BHC: jax.Array,
    q_rope_BHE: jax.Array,
    latent_pages_PSC: jax.Array,
    rope_pages_PSE: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    latent_scales_PS: jax.Array | None = None,
    window_size: int | None = None,
    num_sinks: int = 0,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns sum_j p_j c_j of each head over the positions that a sequence's last one sees.

    The decoding form of multi-head latent attention (DeepSeek-V2, 2024, section 2.1.2): with the
    up-projections absorbed, p = softmax(scale * (q_latent . c_j + q_rope . k_rope_j)), and the
    result [B, H, C], float of q's dtype, is what each head's value projection takes. Tables,
    lengths, window and sinks are those of `paged_attention`.

    Args:
      q_latent_BHC: float [B, H, C], each head's query times its key up-projection.
      q_rope_BHE: [B, H, E], turned by its position.
      latent_pages_PSC: [P, S, C], float or int8: one latent c of a position for all heads.
      rope_pages_PSE: float [P, S, E], the turned rotary key of a position for all heads.
      tables_BN: int32 [B, N] in [0, P).
      lengths_B: int32 [B], at most N * S; 0: an idle place, whose result is zero.
      scale: of the scores: 1 / sqrt(nope_head_dim + rope_head_dim) unless the model says otherwise;
        it can't be told from the shapes here.
      latent_scales_PS: float32 or bfloat16 [P, S], of int8 pages (quantize_positions). The rotary
        keys, an eighth of the channels and the ones that tell positions apart, stay float.
      implementation: as in `paged_attention`.
    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: "triton" without a GPU that runs it, or with pages it can't read.
    Numerics: softmax in float32; float32 within 1e-5 of dense attention.
    """
    _check(q_latent_BHC, q_rope_BHE, latent_pages_PSC, rope_pages_PSE)
    check_tables(q_latent_BHC, tables_BN, lengths_B)
    check_scales(latent_pages_PSC, latent_scales_PS)
    q_rope_BHE = q_rope_BHE.astype(q_latent_BHC.dtype)
    pages = (latent_pages_PSC, rope_pages_PSE, tables_BN, lengths_B.astype(jnp.int32))
    operands = (q_latent_BHC, q_rope_BHE, *pages)
    reach = {"window_size": window_size, "num_sinks": num_sinks}
    settings = {"latent_scales_PS": latent_scales_PS, "scale": scale, **reach}
    widths = (latent_pages_PSC.shape[-1], rope_pages_PSE.shape[-1])
    can_read = lacks(latent_pages_PSC.shape[1], *widths) is None
    if takes_triton(implementation) and (can_read or implementation == "triton"):
        target = current_target()
        return pallas_triton_latent.paged_latent_attention(*operands, **settings, target=target)
    return reference.paged_latent_attention(*operands, **settings)


def _check(
    q_latent_BHC: jax.Array,
    q_rope_BHE: jax.Array,
    latent_pages_PSC: jax.Array,
    rope_pages_PSE: jax.Array,
) -> None:
    same = (
        (q_latent_BHC.shape[:2], q_rope_BHE.shape[:2]),
        (latent_pages_PSC.shape[:2], rope_pages_PSE.shape[:2]),
        (q_latent_BHC.shape[2:], latent_pages_PSC.shape[2:]),
        (q_rope_BHE.shape[2:], rope_pages_PSE.shape[2:]),
    )
    if q_latent_BHC.ndim != 3 or any(ours != theirs for ours, theirs in same):
        raise ValueError(
            f"q_latent {q_latent_BHC.shape}, q_rope {q_rope_BHE.shape}, latent pages "
            f"{latent_pages_PSC.shape} and rope pages {rope_pages_PSE.shape} must be [B, H, C], "
            "[B, H, E], [P, S, C] and [P, S, E]"
        )
