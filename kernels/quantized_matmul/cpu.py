"""quantized_matmul by the native CPU kernels (kernels/native/src/quantized_matmul.cc).

Weights stay in 8 or 4 bits until they are in registers. R rows, E groups, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp

from kernels import native
from kernels.quantize import QTensor
from kernels.quantize.packing import PANEL_OUTPUTS

FORMATS = ("int8", "int4")
LARGEST_BLOCK = 1 << 16
"""Inputs whose products of bytes, 128 * 255 at most, 32 bits can add up."""


def unsupported_reason(x: jax.Array, *weights: QTensor) -> str | None:
    """What these operands lack for the native kernels; None where they can be multiplied."""
    if x.dtype != jnp.float32:
        return f"x is {x.dtype}, they take float32"
    for weight in weights:
        num_inputs, num_outputs = weight.shape[-2:]
        if weight.format not in FORMATS:
            return f"a weight is {weight.format}, they take {' and '.join(FORMATS)}"
        if weight.packing != "panels":
            return f'a weight is packed as {weight.packing}: repack(weight, "panels") once'
        is_block = weight.block_size % 8 == 0 and weight.block_size <= LARGEST_BLOCK
        if not is_block or num_outputs % PANEL_OUTPUTS:
            return (
                f"{num_inputs} inputs in blocks of {weight.block_size} x {num_outputs} outputs, "
                f"they take blocks of multiples of 8 up to {LARGEST_BLOCK:,} and outputs in "
                f"{PANEL_OUTPUTS}s"
            )
    return None


def quantized_matmul(
    x_RK: jax.Array, w_EKN: QTensor, group_sizes_E: jax.Array, *, round_x: bool
) -> jax.Array:
    """x[r] @ w[group of r], [R, N]; zero for rows past the last group."""
    return native.call(
        "moesaic_quantized_matmul",
        _result(x_RK, w_EKN),
        x_RK,
        w_EKN.values,
        w_EKN.scales,
        group_sizes_E.astype(jnp.int32),
        **_attributes(w_EKN, round_x),
    )


def quantized_swiglu(
    x_RK: jax.Array, gate_EKN: QTensor, up_EKN: QTensor, group_sizes_E: jax.Array, *, round_x: bool
) -> jax.Array:
    """silu(x gate) * (x up), [R, N]; zero for rows past the last group."""
    return native.call(
        "moesaic_quantized_swiglu",
        _result(x_RK, gate_EKN),
        x_RK,
        gate_EKN.values,
        gate_EKN.scales,
        up_EKN.values,
        up_EKN.scales,
        group_sizes_E.astype(jnp.int32),
        **_attributes(gate_EKN, round_x),
    )


def _result(x_RK: jax.Array, w_EKN: QTensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x_RK.shape[0], w_EKN.shape[-1]), jnp.float32)


def _attributes(weight: QTensor, round_x: bool) -> dict[str, int | bool]:
    return {"bits": weight.bits, "block": weight.block_size, "round": round_x}
