"""Products of many rows in bfloat16 with one weight, by the native CPU kernels where those were
measured to be faster than XLA's (kernels/native/measured.py), and their gradients.

The platform is known when the program is lowered, not when it is traced: lowered for another than
the CPU it has XLA's products. Sums are float32.

T rows of x, K inputs, N outputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import native
from kernels.backend import current_target, is_split_by_xla
from kernels.grouped_matmul import cpu

FEWEST_ROWS = 32
"""From which packing the weight is repaid: two tiles have as many."""


def is_native(num_rows: int, dtype: jnp.dtype) -> bool:
    """Whether the functions below multiply so many rows of the dtype natively, here and now."""
    if num_rows < FEWEST_ROWS or current_target().platform != "cpu" or is_split_by_xla():
        return False
    return native.takes_bfloat16(dtype, is_grouped=False)


def times_matrix(
    x_TK: jax.Array, w_KN: jax.Array, *, transpose: bool = False, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x @ w, or of x [T, N] its product with the transpose, [T, K].

    Args:
      x_TK: bfloat16.
      w_KN: bfloat16, or float32, which is rounded to it.
      dtype: of the result, bfloat16 or float32; None: x's.
    """
    dtype = jnp.dtype(dtype or x_TK.dtype)

    def ours(x_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
        sizes = jnp.array([x_TK.shape[0]], jnp.int32)
        return cpu.rows_times_matrix(x_TK, w_KN[None], sizes, transpose=transpose, dtype=dtype)

    def plain(x_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
        contracted = (((1,), (1 if transpose else 0,)), ((), ()))
        w_KN = w_KN.astype(x_TK.dtype)
        return lax.dot_general(x_TK, w_KN, contracted, preferred_element_type=dtype)

    return lax.platform_dependent(x_TK, w_KN, cpu=ours, default=plain)


def times_rows(x_TK: jax.Array, dy_TN: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x^T dy, [K, N] in the dtype, of rows in bfloat16."""

    def ours(x_TK: jax.Array, dy_TN: jax.Array) -> jax.Array:
        sizes = jnp.array([x_TK.shape[0]], jnp.int32)
        return cpu.rows_times_rows(x_TK, dy_TN, sizes, dtype=dtype)[0]

    def plain(x_TK: jax.Array, dy_TN: jax.Array) -> jax.Array:
        contracted = (((0,), (0,)), ((), ()))
        return lax.dot_general(x_TK, dy_TN, contracted, preferred_element_type=dtype)

    return lax.platform_dependent(x_TK, dy_TN, cpu=ours, default=plain)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_TK: jax.Array, w_KN: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x @ w in the dtype, differentiable; the gradient of w has w's dtype, unrounded where that is
    float32."""
    return times_matrix(x_TK, w_KN, dtype=dtype)


def _forward(x_TK: jax.Array, w_KN: jax.Array, dtype: jnp.dtype):
    return product(x_TK, w_KN, dtype), (x_TK, w_KN)


def _backward(dtype: jnp.dtype, residuals, dy_TN: jax.Array):
    x_TK, w_KN = residuals
    dy_TN = dy_TN.astype(x_TK.dtype)
    dx_TK = times_matrix(dy_TN, w_KN, transpose=True)
    return dx_TK, times_rows(x_TK, dy_TN, w_KN.dtype)


product.defvjp(_forward, _backward)
