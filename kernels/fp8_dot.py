"""Products of two fp8 matrices in a Triton kernel, which Pallas' own `dot` multiplies in float16.

Imported only by a kernel that multiplies so: it reaches into jax's private modules.

M rows, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp
from jax._src.lib.triton import dialect
from jax._src.pallas.triton import lowering
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from kernels.backend import dot


def dot_e4m3(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """float32 [M, N] of float8_e4m3fn operands, in fp8 tensor cores where K lies together in both.

    Their sums keep some 14 bits (DeepSeek-V3, 2024, section 3.3.2): take K of at most 128 at a time
    and add the results in float32.
    """
    return _dot_e4m3_p.bind(a_MK, b_KN)


_dot_e4m3_p = Primitive("dot_e4m3")
mlir.register_lowering(
    _dot_e4m3_p,
    mlir.lower_fun(
        lambda a, b: dot(a.astype(jnp.float32), b.astype(jnp.float32)), multiple_results=False
    ),
)


@_dot_e4m3_p.def_abstract_eval
def _dot_e4m3_shape(a, b):
    return ShapedArray((a.shape[0], b.shape[1]), jnp.dtype(jnp.float32))


@lowering.register_lowering(_dot_e4m3_p)
def _dot_e4m3_triton(context, a, b):
    """As Pallas lowers `dot`, which allows no imprecise sums: then Triton multiplies in float16."""
    (out,) = context.avals_out
    float32 = mlir.dtype_to_ir_type(jnp.dtype(jnp.float32))
    zeros = lowering._zeros(mlir.ir.RankedTensorType.get(out.shape, float32))
    return dialect.dot(a, b, zeros, max_num_imprecise_acc=2**30)
