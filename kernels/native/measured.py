"""Where native kernels were measured to be faster than XLA's, by instruction set.

In float32 the grouped products and attention are everywhere. In bfloat16, CPU time on one core of
a Xeon (AMX) with XLA held to the same instruction set, times as fast as XLA's dense product (2,048
rows, 256 to 512 inputs, 256 to 1,024 outputs; forward, gradient of x, gradient of w) and as its
grouped one (4,096 rows, 8 groups, 256 x 1,024):

| | dense | grouped |
|---|---|---|
| amx | 3.9 to 6.4, 4.9 to 6.0, 4.0 to 4.2 | 7.7, 4.9, 6.0 |
| avx512 | 1.0 to 1.1, 0.9, 1.0 to 1.1 | 1.6, 0.7, 1.7 |
| avx2 | 0.7, 0.6 to 0.7, 0.7 | 1.4, 0.5, 1.1 |
| baseline (SSE2) | 0.2 to 0.3, 0.2 to 0.3, 0.2 to 0.3 | 0.5, 0.2, 0.4 |

By a script that was not kept, best of 9 (dense) and 5 (grouped), beside other work. NEON was not
measured.
"""

import jax
import jax.numpy as jnp

from kernels.native import library

DENSE_BFLOAT16 = frozenset({"amx"})
GROUPED_BFLOAT16 = frozenset({"amx", "avx512"})
"""Whose three contractions together take less time than XLA's."""


def takes_bfloat16(dtype: jnp.dtype, *, is_grouped: bool) -> bool:
    """Whether a program for the CPU would multiply rows of the dtype, if it is bfloat16, by these
    kernels."""
    if jax.default_backend() != "cpu" or dtype != jnp.bfloat16 or not library.is_available():
        return False
    return library.isa() in (GROUPED_BFLOAT16 if is_grouped else DENSE_BFLOAT16)
