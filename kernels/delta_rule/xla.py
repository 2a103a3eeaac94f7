"""The gated delta rule chunk by chunk: products of matrices in place of a step for each token.

Inside a chunk G_i is the sum of log decays up to token i, and Gamma_ij = exp(G_i - G_j) what is
left at i of what j wrote. The changes that the tokens of a chunk make, D, follow from

    D_i = beta_i (v_i - (exp(G_i) k_i)^T S - sum over j < i of (k_i Gamma_ij k_j) D_j),

a triangular system (Yang et al. 2024, section 3.3). It is solved by products: LAPACK's solver, as
jaxlib calls it for many small systems, waits for XLA's threads on those threads, and two devices of
one processor wait for ever. Tokens see each other and the state before the chunk only inside their
document. Letters as in api.py; R rows of one head (B * H), C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from kernels.chunks import chunk_size, chunks, documents_of
from kernels.delta_rule import reference

CHUNK, CHUNK_OF_CHANNELS = 64, 16
"""Tokens of a chunk: with a decay for each channel, Gamma is an array [C, C, K]."""
SMALLEST = 8
"""Tokens of a block whose system is solved by its series."""


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
    batch, length, heads, _ = q_BLHK.shape
    tokens = (q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, beta_BLH)
    if length == 1:
        return reference.delta_rule(*tokens, is_start_BL, state_BHKV)
    most = CHUNK if log_decay_BLHK.shape[-1] == 1 else CHUNK_OF_CHANNELS
    chunk = chunk_size(length, most)
    by_head = [jnp.moveaxis(x, 2, 1).reshape(batch * heads, length, *x.shape[3:]) for x in tokens]
    by_head.append(jnp.repeat(is_start_BL, heads, axis=0))
    # A chunk's residuals are made again in the backward pass: only states are kept.
    state_RKV, out_NRCV = jax.lax.scan(
        jax.checkpoint(_read_chunk),
        state_BHKV.reshape(batch * heads, *state_BHKV.shape[2:]),
        tuple(chunks(x, chunk) for x in by_head),
    )
    out_RLV = jnp.moveaxis(out_NRCV, 0, 1).reshape(batch * heads, -1, v_BLHV.shape[-1])
    out_BHLV = out_RLV[:, :length].reshape(batch, heads, length, -1)
    return jnp.moveaxis(out_BHLV, 1, 2), state_RKV.reshape(state_BHKV.shape)


def _read_chunk(state_RKV: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q_RCK, k_RCK, v_RCV, log_decay_RCK, beta_RC, is_start_RC = tokens
    document_RC, sees_RCC = documents_of(is_start_RC)
    total_RCK = jnp.cumsum(log_decay_RCK, axis=1)
    since_RCK = jnp.where((document_RC == 0)[..., None], jnp.exp(total_RCK), 0.0)

    with_keys, with_queries = (
        _decayed_products(x_RCK, k_RCK, total_RCK, sees_RCC) for x_RCK in (k_RCK, q_RCK)
    )
    known_RCV = jnp.einsum("RCK,RKV->RCV", k_RCK * since_RCK, state_RKV)
    solve_RCC = _inverse(jnp.tril(beta_RC[..., None] * with_keys, -1))
    change_RCV = jnp.einsum("RCc,RcV->RCV", solve_RCC, beta_RC[..., None] * (v_RCV - known_RCV))
    out_RCV = jnp.einsum("RCK,RKV->RCV", q_RCK * since_RCK, state_RKV)
    out_RCV += jnp.einsum("RCc,RcV->RCV", with_queries, change_RCV)

    is_last_RC1 = (document_RC == document_RC[:, -1:])[..., None]
    until_RCK = jnp.where(is_last_RC1, jnp.exp(total_RCK[:, -1:] - total_RCK), 0.0)
    state_RKV = since_RCK[:, -1, :, None] * state_RKV
    state_RKV += jnp.einsum("RCK,RCV->RKV", k_RCK * until_RCK, change_RCV)
    return state_RKV, out_RCV


def _inverse(below_RCC: jax.Array) -> jax.Array:
    """(I + A)^-1 of strictly lower triangular A, of a power of two.

    Blocks of 8 by their series, which ends as A^8 = 0 (in larger ones its terms would be so large
    that their differences lose digits); then two blocks of the diagonal at a time become one.
    """
    rows, chunk, _ = below_RCC.shape
    size = min(SMALLEST, chunk)
    eye = jnp.eye(size, dtype=below_RCC.dtype)[None]
    a = _diagonal(below_RCC, size, 0)
    a2 = a @ a
    made = (eye - a) @ (eye + a2) @ (eye + a2 @ a2)  # [R * C / size, size, size]
    while size < chunk:
        pairs = made.reshape(-1, 2, size, size)
        first, second = pairs[:, 0], pairs[:, 1]
        between = -second @ _diagonal(below_RCC, size, 1) @ first
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
        made = jnp.concatenate([top, jnp.concatenate([between, second], axis=2)], axis=1)
        size *= 2
    return made.reshape(rows, chunk, chunk)


def _diagonal(x_RCC: jax.Array, size: int, below: int) -> jax.Array:
    """The blocks of the diagonal, or every other one of those below them, one after the other,
    [-1, size, size]."""
    step = size * (1 + below)
    blocks = [
        x_RCC[:, i + below * size : i + (1 + below) * size, i : i + size]
        for i in range(0, x_RCC.shape[1], step)
    ]
    return jnp.stack(blocks, axis=1).reshape(-1, size, size)


def _decayed_products(
    x_RCK: jax.Array, k_RCK: jax.Array, total_RCK: jax.Array, sees_RCC: jax.Array
) -> jax.Array:
    """x_i . Gamma_ij k_j of each pair i, j in which i sees j, 0 of the others; [R, C, C]."""
    gap_RCCK = total_RCK[:, :, None] - total_RCK[:, None]
    # Where j comes after i the gap is positive, and its exponential may be no float32.
    left_RCCK = jnp.exp(jnp.where(sees_RCC[..., None], gap_RCCK, -jnp.inf))
    if left_RCCK.shape[-1] == 1:
        return jnp.einsum("RCK,RcK->RCc", x_RCK, k_RCK) * left_RCCK[..., 0]
    return jnp.einsum("RCK,RcK,RCcK->RCc", x_RCK, k_RCK, left_RCCK)
