"""The definition of quantized_matmul: the weights made floats, then multiplied.

R rows sorted by group, E groups, K inputs, N outputs, Z inputs of a block.
"""

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import grouped_matmul
from kernels.quantize import QTensor, dequantize


def quantized_matmul(x_RK: jax.Array, w_EKN: QTensor, group_sizes_E: jax.Array) -> jax.Array:
    """x[r] @ w[group of r], [R, N]; zero for rows past the last group."""
    return grouped_matmul(x_RK, dequantize(w_EKN), group_sizes_E, implementation="reference")


def quantized_swiglu(
    x_RK: jax.Array, gate_EKN: QTensor, up_EKN: QTensor, group_sizes_E: jax.Array
) -> jax.Array:
    """silu(x gate) * (x up), [R, N]."""
    gate_RN = quantized_matmul(x_RK, gate_EKN, group_sizes_E)
    return jax.nn.silu(gate_RN) * quantized_matmul(x_RK, up_EKN, group_sizes_E)


def round_rows(x_RK: jax.Array, block_size: int) -> jax.Array:
    """x as 8-bit activations stand for it: each block's largest magnitude becomes 127."""
    x_RSZ = x_RK.reshape(x_RK.shape[0], -1, block_size)
    scale_RS1 = jnp.abs(x_RSZ).max(axis=-1, keepdims=True) / 127
    rounded = jnp.round(x_RSZ / jnp.where(scale_RS1 > 0, scale_RS1, 1.0)) * scale_RS1
    return rounded.reshape(x_RK.shape)
