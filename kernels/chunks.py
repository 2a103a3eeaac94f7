"""Rows of tokens cut into chunks, for recurrences that multiply a whole chunk at once.

R rows, L tokens of a row, N chunks, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp


def chunk_size(length: int, most: int) -> int:
    """The smallest of `most`, halved again and again, that still holds the row; or `most`."""
    while most // 2 >= length:
        most //= 2
    return most


def chunks(x_RL: jax.Array, chunk: int) -> jax.Array:
    """[N, R, C, ...]; what fills the last chunk is zero, which changes no state."""
    missing = -x_RL.shape[1] % chunk
    x_RL = jnp.pad(x_RL, ((0, 0), (0, missing), *[(0, 0)] * (x_RL.ndim - 2)))
    return jnp.moveaxis(x_RL.reshape(len(x_RL), -1, chunk, *x_RL.shape[2:]), 1, 0)


def documents_of(is_start_RC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's document, int32 [R, C], of which 0 is the one that the state is of; and whether
    a token sees another, of its document and not after it, bool [R, C, C]."""
    document_RC = jnp.cumsum(is_start_RC, axis=1)
    sees_RCC = document_RC[:, :, None] == document_RC[:, None]
    return document_RC, sees_RCC & jnp.tri(document_RC.shape[1], dtype=bool)[None]
