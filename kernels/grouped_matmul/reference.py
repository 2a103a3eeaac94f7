"""The definition of grouped_matmul: every row with every matrix, then the row's own is kept.

Costs E times the useful work, so it is for tests. R rows, E groups, D and F widths.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Returns y[r] = x[r] @ w[group of r], and zero for rows past the last group."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    is_member_RE = (row_R1 >= (ends_E - group_sizes_E)[None]) & (row_R1 < ends_E[None])
    y_REF = jnp.einsum("RD,EDF->REF", x_RD, w_EDF, preferred_element_type=jnp.float32)
    return jnp.where(is_member_RE[:, :, None], y_REF, 0.0).sum(axis=1).astype(x_RD.dtype)
