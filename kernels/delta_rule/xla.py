"""The gated delta rule chunk by chunk: products of matrices in place of a step for each token.

Inside a chunk G_i is the sum of log decays up to token i, and Gamma_ij = exp(G_i - G_j) what is
left at i of what j wrote. The changes that the tokens of a chunk make, D, follow from

    D_i = beta_i (v_i - (exp(G_i) k_i)^T S - sum over j < i of (k_i Gamma_ij k_j) D_j),

a triangular system (Yang et al. 2024, section 3.3). Tokens see each other and the state before the
chunk only inside their document. Letters as in api.py; C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from kernels.delta_rule import reference

CHUNK, CHUNK_OF_CHANNELS = 64, 16
"""Tokens of a chunk: with a decay for each channel, Gamma is an array [C, C, K]."""


def delta_rule(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLHK: jax.Array,
    beta_BLH: jax.Array,
    is_start_BL: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; padding has a beta and a decay that change nothing. All float32."""
    length = q_BLHK.shape[1]
    tokens = (q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, beta_BLH, is_start_BL)
    if length == 1:
        return reference.delta_rule(*tokens, state_BHKV)
    chunk = CHUNK if log_decay_BLHK.shape[-1] == 1 else CHUNK_OF_CHANNELS
    while chunk // 2 >= length:
        chunk //= 2
    # A chunk's residuals are made again in the backward pass: only states are kept.
    state_BHKV, out_NBCHV = jax.lax.scan(
        jax.checkpoint(_read_chunk), state_BHKV, tuple(_chunks(x, chunk) for x in tokens)
    )
    out_BNCHV = jnp.moveaxis(out_NBCHV, 0, 1)
    return out_BNCHV.reshape(len(q_BLHK), -1, *v_BLHV.shape[2:])[:, :length], state_BHKV


def _chunks(x_BL: jax.Array, chunk: int) -> jax.Array:
    """[N, B, C, ...]; what fills the last chunk is zero, which changes no state."""
    missing = -x_BL.shape[1] % chunk
    x_BL = jnp.pad(x_BL, ((0, 0), (0, missing), *[(0, 0)] * (x_BL.ndim - 2)))
    return jnp.moveaxis(x_BL.reshape(len(x_BL), -1, chunk, *x_BL.shape[2:]), 1, 0)


def _read_chunk(
    state_BHKV: jax.Array, tokens: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    *heads_first, is_start_BC = tokens
    q, k, v, log_decay, beta = (jnp.moveaxis(x, 2, 1) for x in heads_first)  # [B, H, C, ...]
    document_BC = jnp.cumsum(is_start_BC, axis=1)
    state_BHKV, out_BHCV = jax.vmap(_read)(state_BHKV, q, k, v, log_decay, beta, document_BC)
    return state_BHKV, jnp.moveaxis(out_BHCV, 1, 2)


def _read(
    state_HKV: jax.Array,
    q_HCK: jax.Array,
    k_HCK: jax.Array,
    v_HCV: jax.Array,
    log_decay_HCK: jax.Array,
    beta_HC: jax.Array,
    document_C: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A chunk of one row; document 0 is the one that the state is of."""
    total_HCK = jnp.cumsum(log_decay_HCK, axis=1)
    sees_CC = (document_C[:, None] == document_C[None]) & jnp.tri(len(document_C), dtype=bool)
    is_old_C1 = (document_C == 0)[:, None]
    since_HCK = jnp.where(is_old_C1[None], jnp.exp(total_HCK), 0.0)

    with_keys, with_queries = (
        _decayed_products(x_HCK, k_HCK, total_HCK, sees_CC) for x_HCK in (k_HCK, q_HCK)
    )
    known_HCV = jnp.einsum("HCK,HKV->HCV", k_HCK * since_HCK, state_HKV)
    change_HCV = jax.lax.linalg.triangular_solve(
        jnp.tril(beta_HC[..., None] * with_keys, -1),
        beta_HC[..., None] * (v_HCV - known_HCV),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    out_HCV = jnp.einsum("HCK,HKV->HCV", q_HCK * since_HCK, state_HKV)
    out_HCV += jnp.einsum("HCc,HcV->HCV", with_queries, change_HCV)

    is_last_C1 = (document_C == document_C[-1])[:, None]
    until_HCK = jnp.where(is_last_C1[None], jnp.exp(total_HCK[:, -1:] - total_HCK), 0.0)
    state_HKV = since_HCK[:, -1, :, None] * state_HKV
    state_HKV += jnp.einsum("HCK,HCV->HKV", k_HCK * until_HCK, change_HCV)
    return state_HKV, out_HCV


def _decayed_products(
    x_HCK: jax.Array, k_HCK: jax.Array, total_HCK: jax.Array, sees_CC: jax.Array
) -> jax.Array:
    """x_i . Gamma_ij k_j of each pair i, j in which i sees j, 0 of the others; [H, C, C]."""
    gap_HCCK = total_HCK[:, :, None] - total_HCK[:, None]
    # Where j comes after i the gap is positive, and its exponential may be no float32.
    left_HCCK = jnp.exp(jnp.where(sees_CC[None, :, :, None], gap_HCCK, -jnp.inf))
    if left_HCCK.shape[-1] == 1:
        return jnp.einsum("HCK,HcK->HCc", x_HCK, k_HCK) * left_HCCK[..., 0]
    return jnp.einsum("HCK,HcK,HCcK->HCc", x_HCK, k_HCK, left_HCCK)
