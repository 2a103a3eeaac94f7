"""The state space recurrence chunk by chunk: products of matrices in place of a step for each
token.

Inside a chunk G_i is the sum of log decays up to token i. What token i reads is exp(G_i) q_i^T S of
the state before the chunk, and of each token j up to i, exp(G_i - G_j) (q_i . k_j) v_j (Dao & Gu
2024, section 6). Tokens see each other and the state before the chunk only inside their document.
Letters as in api.py; R rows of one group (B * G), J heads of a group, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from kernels.chunks import chunk_size, chunks, documents_of
from kernels.state_space import reference

CHUNK = 64
"""Tokens of a chunk."""


def state_space(
    q_BLGK: jax.Array,
    k_BLGK: jax.Array,
    v_BLHV: jax.Array,
    log_decay_BLH: jax.Array,
    is_start_BL: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; padding has values and a decay that change nothing. All float32."""
    batch, length, groups, _ = q_BLGK.shape
    tokens = (q_BLGK, k_BLGK, v_BLHV, log_decay_BLH)
    if length == 1:
        return reference.state_space(*tokens, is_start_BL, state_BHKV)
    chunk = chunk_size(length, CHUNK)
    rows, heads = batch * groups, v_BLHV.shape[2]
    v_BLGJV, log_decay_BLGJ = (
        x.reshape(batch, length, groups, heads // groups, *x.shape[3:])
        for x in (v_BLHV, log_decay_BLH)
    )
    by_group = [
        jnp.moveaxis(x, 2, 1).reshape(rows, length, *x.shape[3:])
        for x in (q_BLGK, k_BLGK, v_BLGJV, log_decay_BLGJ)
    ]
    by_group.append(jnp.repeat(is_start_BL, groups, axis=0))
    # A chunk's residuals are made again in the backward pass: only states are kept.
    state_RJKV, out_NRCJV = jax.lax.scan(
        jax.checkpoint(_read_chunk),
        state_BHKV.reshape(rows, heads // groups, *state_BHKV.shape[2:]),
        tuple(chunks(x, chunk) for x in by_group),
    )
    out_RLJV = jnp.moveaxis(out_NRCJV, 0, 1).reshape(rows, -1, *out_NRCJV.shape[3:])[:, :length]
    out_BGLJV = out_RLJV.reshape(batch, groups, *out_RLJV.shape[1:])
    return jnp.moveaxis(out_BGLJV, 1, 2).reshape(v_BLHV.shape), state_RJKV.reshape(state_BHKV.shape)


def _read_chunk(
    state_RJKV: jax.Array, tokens: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    q_RCK, k_RCK, v_RCJV, log_decay_RCJ, is_start_RC = tokens
    document_RC, sees_RCC = documents_of(is_start_RC)
    total_RCJ = jnp.cumsum(log_decay_RCJ, axis=1)
    gap_RCCJ = total_RCJ[:, :, None] - total_RCJ[:, None]
    # Where j comes after i the gap is positive, and its exponential may be no float32.
    left_RCCJ = jnp.exp(jnp.where(sees_RCC[..., None], gap_RCCJ, -jnp.inf))
    since_RCJ = jnp.where((document_RC == 0)[..., None], jnp.exp(total_RCJ), 0.0)

    scores_RCCJ = jnp.einsum("RCK,RcK->RCc", q_RCK, k_RCK)[..., None] * left_RCCJ
    out_RCJV = jnp.einsum("RCcJ,RcJV->RCJV", scores_RCCJ, v_RCJV)
    out_RCJV += jnp.einsum("RCK,RJKV->RCJV", q_RCK, state_RJKV) * since_RCJ[..., None]

    is_last_RC1 = (document_RC == document_RC[:, -1:])[..., None]
    until_RCJ = jnp.where(is_last_RC1, jnp.exp(total_RCJ[:, -1:] - total_RCJ), 0.0)
    state_RJKV = since_RCJ[:, -1, :, None, None] * state_RJKV
    state_RJKV += jnp.einsum("RCK,RCJV->RJKV", k_RCK, until_RCJ[..., None] * v_RCJV)
    return state_RJKV, out_RCJV
