"""quantized_matmul in plain XLA: the weights made floats, then multiplied by groups.

XLA writes the floats to memory and reads them back, so this saves memory on disk and none of its
time: a product of one row runs slower than in float32 (docs/experiments.md). For where there are no
native kernels. R rows, E groups, K inputs, N outputs.
"""

import jax

from kernels.grouped_matmul import grouped_matmul
from kernels.quantize import QTensor, dequantize


def quantized_matmul(x_RK: jax.Array, w_EKN: QTensor, group_sizes_E: jax.Array) -> jax.Array:
    """x[r] @ w[group of r], [R, N]."""
    return grouped_matmul(x_RK, dequantize(w_EKN, x_RK.dtype.name), group_sizes_E)


def quantized_swiglu(
    x_RK: jax.Array, gate_EKN: QTensor, up_EKN: QTensor, group_sizes_E: jax.Array
) -> jax.Array:
    """silu(x gate) * (x up), [R, N]."""
    gate_RN = quantized_matmul(x_RK, gate_EKN, group_sizes_E)
    return jax.nn.silu(gate_RN) * quantized_matmul(x_RK, up_EKN, group_sizes_E)
