"""Products of a few rows in float32 with one large weight, by the native CPU kernel that reads it
as it lies: what decoding one text does. XLA's products leave a part of the memory's rate unused.

The platform is known when the program is lowered, not when it is traced: lowered for another than
the CPU it has XLA's products.

T rows of x, K inputs, N outputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import native
from kernels.backend import current_target, is_split_by_xla

MOST_ROWS = 4
"""As the C++ has it (gemm.h: kThinRows)."""
FEWEST_WEIGHTS = 1 << 15
"""Of less XLA makes a part of what is around the product."""


def is_native(num_rows: int, x_dtype: jnp.dtype, weight: jax.Array) -> bool:
    """Whether `product` multiplies so many rows by the weight natively, here and now."""
    is_float = x_dtype == weight.dtype == jnp.float32
    if not is_float or not 1 <= num_rows <= MOST_ROWS or weight.size < FEWEST_WEIGHTS:
        return False
    is_cpu = current_target().platform == jax.default_backend() == "cpu"
    return is_cpu and not is_split_by_xla() and native.is_available()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_TK: jax.Array, w: jax.Array, outputs_first: bool) -> jax.Array:
    """x @ w, [T, N], differentiable: the gradients are XLA's.

    Args:
      x_TK: float32, up to MOST_ROWS rows.
      w: float32 [K, N], or outputs_first [N, K].
    """
    num_outputs = w.shape[0 if outputs_first else 1]
    result = jax.ShapeDtypeStruct((x_TK.shape[0], num_outputs), jnp.float32)
    ours = partial(native.call, "moesaic_thin_matmul", result, outputs_first=outputs_first)
    plain = partial(_plain, outputs_first=outputs_first)
    return lax.platform_dependent(x_TK, w, cpu=ours, default=plain)


def _plain(x_TK: jax.Array, w: jax.Array, *, outputs_first: bool) -> jax.Array:
    return lax.dot_general(x_TK, w, (((1,), (1 if outputs_first else 0,)), ((), ())))


def _forward(x_TK: jax.Array, w: jax.Array, outputs_first: bool):
    return product(x_TK, w, outputs_first), (x_TK, w)


def _backward(outputs_first: bool, residuals, dy_TN: jax.Array):
    _, pull = jax.vjp(partial(_plain, outputs_first=outputs_first), *residuals)
    return pull(dy_TN)


product.defvjp(_forward, _backward)
