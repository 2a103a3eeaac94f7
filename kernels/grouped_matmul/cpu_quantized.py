"""Grouped products by the native CPU kernels with weights of few bits.

kernels/native/src/quantized_matmul.cc; weights stay in 8 or 4 bits until they are in registers.
R rows, E groups, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp

from kernels import native
from kernels.grouped_matmul.cpu import ACTIVATIONS
from kernels.grouped_matmul.request import Request
from kernels.quantize import QTensor
from kernels.quantize.packing import PANEL_OUTPUTS

LARGEST_BLOCK = 1 << 16
"""Inputs whose products of bytes, 128 * 255 at most, 32 bits can add up."""


def unsupported_reason(request: Request) -> str | None:
    """What keeps the native kernels from this product, in a sentence; None: nothing."""
    weight = request.weight
    assert isinstance(weight, QTensor)
    if weight.format == "fp8_e4m3" and request.activations == "int8":
        return "the CPU kernels round x for int8 and int4 weights alone: pass activations='float'"
    if weight.packing != "panels":
        return (
            f"the CPU kernels read weights in panels and these are {weight.packing}: "
            "kernels.quantize.repack(weight, 'panels') once, as preferred_packing says"
        )
    if weight.block_size % 8 or weight.block_size > LARGEST_BLOCK:
        return (
            f"the CPU kernels need blocks of a multiple of 8 inputs up to {LARGEST_BLOCK:,}, and "
            f"these weights have block_size={weight.block_size}: quantize them again"
        )
    if request.num_outputs % PANEL_OUTPUTS:
        return (
            f"the CPU kernels multiply {PANEL_OUTPUTS} outputs at a time, and these weights have "
            f"{request.num_outputs}: take 'xla'"
        )
    return None


def multiply(request: Request) -> jax.Array:
    """The product, [R, N] in x's dtype; zero for rows past the last group."""
    weight, x_RK = request.weight, request.sorted_x
    assert isinstance(weight, QTensor)
    result = jax.ShapeDtypeStruct((request.num_rows, request.num_outputs), jnp.float32)
    none = jnp.zeros((0,), weight.scales.dtype)
    y_RN = native.call(
        "moesaic_quantized_matmul",
        result,
        x_RK.astype(jnp.float32),
        weight.values,
        weight.scales,
        none if weight.offsets is None else weight.offsets,
        request.group_sizes_E.astype(jnp.int32),
        activations=ACTIVATIONS[request.activations],
        block=weight.block_size,
        fixed_order=request.fixed_order,
        gated=request.gated,
    )
    return y_RN.astype(x_RK.dtype)
