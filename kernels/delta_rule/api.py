"""The signature of delta_rule and its checks.

B rows, L tokens of a row, H heads, K width of keys, V of values.
"""

from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from kernels.delta_rule import reference, xla

Implementation = Literal["auto", "reference", "xla"]


def delta_rule(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLHK: jax.Array,
    beta_BLH: jax.Array,
    positions_BL: jax.Array,
    state_BHKV: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Returns what each token reads, [B, L, H, V] in v's dtype, and the states after the rows.

        S = diag(exp(g)) S;    S = S + k (beta (v - S^T k))^T;    o = S^T q

    With one decay for all channels of a head it is the gated delta rule (Yang et al. 2024,
    arXiv:2412.06464), with one for each that of Kimi delta attention (2025, arXiv:2510.26692).

    Args:
      q_BLHK, k_BLHK: float; k of length at most 1, q with the scale of scores in it.
      v_BLHV: float.
      log_decay_BLHK: g <= 0, float [B, L, H, K] or, of a whole head, [B, L, H, 1].
      beta_BLH: float in [0, 2], how much of what k stands for is replaced; more than once turns it.
      positions_BL: int32; a token at 0 begins a document, with an empty state; -1 is padding, which
        leaves the state as it is and whose result is unspecified but finite.
      state_BHKV: float32, what the tokens before the rows have left.
      implementation: "reference" reads token by token; "xla" multiplies whole chunks of tokens, and
        reads single ones as they are; "auto" is "xla".
    Raises:
      ValueError: shapes that do not fit.
    Numerics: float32 inside; "xla" is within 1e-5 of the reference, relative to the largest value.
    """
    _check(q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, beta_BLH, positions_BL, state_BHKV)
    is_padding = (positions_BL < 0)[:, :, None]
    match implementation:
        case "reference":
            run = reference.delta_rule
        case "xla" | "auto":
            run = xla.delta_rule
        case _:
            assert_never(implementation)
    out_BLHV, state_BHKV = run(
        q_BLHK.astype(jnp.float32),
        k_BLHK.astype(jnp.float32),
        v_BLHV.astype(jnp.float32),
        jnp.where(is_padding[..., None], 0.0, log_decay_BLHK.astype(jnp.float32)),
        jnp.where(is_padding, 0.0, beta_BLH.astype(jnp.float32)),
        positions_BL == 0,
        state_BHKV,
    )
    return out_BLHV.astype(v_BLHV.dtype), state_BHKV


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    positions: jax.Array,
    state: jax.Array,
) -> None:
    batch, length, heads, keys = k.shape
    widths = {(batch, length, heads, 1), k.shape}
    if q.shape != k.shape or log_decay.shape not in widths or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} and log_decay {log_decay.shape} must be "
            "[B, L, H, K] twice, [B, L, H, V] and [B, L, H, K or 1]"
        )
    if beta.shape != (batch, length, heads) or positions.shape != (batch, length):
        raise ValueError(
            f"beta {beta.shape} and positions {positions.shape} must be {(batch, length, heads)} "
            f"and {(batch, length)}"
        )
    if state.shape != (batch, heads, keys, v.shape[-1]) or state.dtype != jnp.float32:
        raise ValueError(
            f"state {state.shape} {state.dtype} must be {(batch, heads, keys, v.shape[-1])} float32"
        )
