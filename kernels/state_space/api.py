"""The signature of state_space and its checks.

B rows, L tokens of a row, G groups of heads, H heads, K width of keys, V of values.
"""

from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from kernels.state_space import reference, xla

Implementation = Literal["auto", "reference", "xla"]


def state_space(
    q_BLGK: jax.Array,
    k_BLGK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLH: jax.Array,
    positions_BL: jax.Array,
    state_BHKV: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Returns what each token reads, [B, L, H, V] in v's dtype, and the states after the rows.

        S = exp(g) S + k v^T;    o = S^T q

    Mamba-2's recurrence (Dao & Gu 2024, arXiv:2405.21060), where q is C, k is B and v is the input
    times the token's step.

    Args:
      q_BLGK, k_BLGK: float; of a group, which H / G neighbouring heads share.
      v_BLHV: float.
      log_decay_BLH: g <= 0, float.
      positions_BL: int32; a token at 0 begins a document, with an empty state; -1 is padding, which
        leaves the state as it is and whose result is unspecified but finite.
      state_BHKV: float32, what the tokens before the rows have left.
      implementation: "reference" reads token by token; "xla" multiplies whole chunks of tokens, and
        reads single ones as they are; "auto" is "xla".
    Raises:
      ValueError: shapes that do not fit.
    Numerics: float32 inside; "xla" is within 1e-5 of the reference, relative to the largest value.
    """
    _check(q_BLGK, k_BLGK, v_BLHV, log_decay_BLH, positions_BL, state_BHKV)
    is_padding_BL1 = (positions_BL < 0)[:, :, None]
    match implementation:
        case "reference":
            run = reference.state_space
        case "xla" | "auto":
            run = xla.state_space
        case _:
            assert_never(implementation)
    out_BLHV, state_BHKV = run(
        q_BLGK.astype(jnp.float32),
        k_BLGK.astype(jnp.float32),
        jnp.where(is_padding_BL1[..., None], 0.0, v_BLHV.astype(jnp.float32)),
        jnp.where(is_padding_BL1, 0.0, log_decay_BLH.astype(jnp.float32)),
        positions_BL == 0,
        state_BHKV,
    )
    return out_BLHV.astype(v_BLHV.dtype), state_BHKV


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    positions: jax.Array,
    state: jax.Array,
) -> None:
    batch, length, groups, keys = k.shape
    heads = v.shape[2]
    if q.shape != k.shape or v.shape[:2] != (batch, length) or heads % groups:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [B, L, G, K] twice and [B, L, H, V] "
            "with H a multiple of G"
        )
    if log_decay.shape != (batch, length, heads) or positions.shape != (batch, length):
        raise ValueError(
            f"log_decay {log_decay.shape} and positions {positions.shape} must be "
            f"{(batch, length, heads)} and {(batch, length)}"
        )
    if state.shape != (batch, heads, keys, v.shape[-1]) or state.dtype != jnp.float32:
        raise ValueError(
            f"state {state.shape} {state.dtype} must be {(batch, heads, keys, v.shape[-1])} float32"
        )
