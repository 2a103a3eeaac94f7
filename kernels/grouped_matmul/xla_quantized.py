"""Grouped products with weights of few bits made floats: plain XLA, and the definition of correct.

XLA writes the floats to memory and reads them back, so this saves memory on disk and none of its
time: a product of one row runs slower than in float32 (docs/experiments.md). For where there are no
kernels. R rows, S blocks of Z inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul.request import Request
from kernels.quantize import QTensor, dequantize


def widened(request: Request) -> Request:
    """The same product of floats: weights in x's dtype, and x rounded where that was asked for."""
    weight, x_TK = request.weight, request.x_TK
    assert isinstance(weight, QTensor)
    if request.activations == "int8":
        x_TK = round_rows(x_TK, weight.block_size)
    floats_EKN = lax.stop_gradient(dequantize(weight, x_TK.dtype.name))
    return dataclasses.replace(request, x_TK=x_TK, weight=floats_EKN, activations="float")


def round_rows(x_RK: jax.Array, block_size: int) -> jax.Array:
    """x as 8-bit activations stand for it: each block's largest magnitude becomes 127."""
    x_RSZ = x_RK.reshape(x_RK.shape[0], -1, block_size)
    scale_RS1 = jnp.abs(x_RSZ).max(axis=-1, keepdims=True) / 127
    rounded = jnp.round(x_RSZ / jnp.where(scale_RS1 > 0, scale_RS1, 1.0)) * scale_RS1
    return rounded.reshape(x_RK.shape)
