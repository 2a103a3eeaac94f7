"""The orders in which backends keep values, so that unpacking moves none between lanes.

K inputs, N outputs, S blocks of inputs.

`canonical`: an output's inputs one after the other; of int4, byte b holds inputs 2b (low nibble)
and 2b + 1. What checkpoints keep.
`split_128` (Pallas-Triton, int4): within every 128 inputs, byte b holds inputs b (low) and b + 64.
`panels` (native CPU kernels): 16 outputs side by side with four inputs each, so that 64 bytes are
one instruction's operands: [N/16, K/4, 16, 4]; of int4 [N/16, K/8, 16, 4] bytes whose low nibbles
are the first four of eight inputs. A panel's scales, and offsets, lie together too: [N/16, S, 16].
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.quantize.qtensor import Packing, QTensor

PANEL_OUTPUTS = 16
"""Outputs side by side in a panel."""


def pack_nibbles(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two int8 arrays in -8..7 as one of bytes."""
    return (low.astype(jnp.uint8) & 0xF) | (high.astype(jnp.uint8) << 4)


def unpack_nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of pack_nibbles: the low and the high ones, int8."""
    low, high = (packed & 0xF).astype(jnp.int8), (packed >> 4).astype(jnp.int8)
    return jnp.where(low > 7, low - 16, low), jnp.where(high > 7, high - 16, high)


def pack(values_NK: jax.Array, bits: int, packing: Packing) -> jax.Array:
    """Stored values of int8 or fp8 [..., N, K] in plain order: [..., N, K * bits / 8].

    Raises:
      ValueError: N or K is not a multiple of what the order puts side by side.
    """
    *leading, num_outputs, num_inputs = values_NK.shape
    _check(num_outputs, num_inputs, bits, packing)
    if bits == 8 and packing != "panels":
        return values_NK
    if packing == "panels":
        group = 32 // bits  # inputs of an output that lie in four bytes
        shape = (*leading, num_outputs // PANEL_OUTPUTS, PANEL_OUTPUTS, num_inputs // group, group)
        ordered = jnp.swapaxes(values_NK.reshape(shape), -3, -2)
    else:
        period = 2 if packing == "canonical" else 128
        ordered = values_NK.reshape(*leading, num_outputs, num_inputs // period, period)
    stored = pack_nibbles(*jnp.split(ordered, 2, axis=-1)) if bits == 4 else ordered
    return stored.reshape(*leading, num_outputs, num_inputs * bits // 8)


def unpack(stored: jax.Array, bits: int, packing: Packing) -> jax.Array:
    """The inverse of pack."""
    if bits == 8 and packing != "panels":
        return stored
    *leading, num_outputs, num_bytes = stored.shape
    if packing == "panels":
        shape = (*leading, num_outputs // PANEL_OUTPUTS, num_bytes // 4, PANEL_OUTPUTS, 4)
    else:
        half = 1 if packing == "canonical" else 64
        shape = (*leading, num_outputs, num_bytes // half, half)
    ordered = stored.reshape(shape)
    if bits == 4:
        ordered = jnp.concatenate(unpack_nibbles(ordered), axis=-1)
    if packing == "panels":
        ordered = jnp.swapaxes(ordered, -3, -2)
    return ordered.reshape(*leading, num_outputs, num_bytes * 8 // bits)


def unpack_output(stored_B: jax.Array, bits: int, packing: Packing) -> jax.Array:
    """The values [..., K] of the stored bytes [..., K * bits / 8] of one output."""
    if bits == 8:
        return stored_B
    *leading, num_bytes = stored_B.shape
    period = stored_B.reshape(*leading, -1, {"canonical": 1, "panels": 4, "split_128": 64}[packing])
    values = jnp.concatenate(unpack_nibbles(period), axis=-1)
    return values.reshape(*leading, 2 * num_bytes)


def pack_scales(scales_SN: jax.Array, packing: Packing) -> jax.Array:
    """Scales [..., S, N] as the order keeps them: [..., N/16, S, 16] for panels."""
    if packing != "panels":
        return scales_SN
    *leading, num_blocks, num_outputs = scales_SN.shape
    shape = (*leading, num_blocks, num_outputs // PANEL_OUTPUTS, PANEL_OUTPUTS)
    return jnp.swapaxes(scales_SN.reshape(shape), -3, -2)


def unpack_scales(scales: jax.Array, packing: Packing) -> jax.Array:
    """The inverse of pack_scales."""
    if packing != "panels":
        return scales
    *leading, num_panels, num_blocks, width = scales.shape
    return jnp.swapaxes(scales, -3, -2).reshape(*leading, num_blocks, num_panels * width)


def repack(weight: QTensor, packing: Packing) -> QTensor:
    """The same weights in another order.

    Raises:
      ValueError: K or N is not a multiple of what the order puts side by side.
    """
    if weight.packing == packing:
        return weight
    plain = unpack(weight.values, weight.bits, weight.packing)
    values = pack(plain, weight.bits, packing)
    scales, offsets = (
        None if x is None else pack_scales(unpack_scales(x, weight.packing), packing)
        for x in (weight.scales, weight.offsets)
    )
    return dataclasses.replace(
        weight, values=values, scales=scales, offsets=offsets, packing=packing
    )


def _check(num_outputs: int, num_inputs: int, bits: int, packing: Packing) -> None:
    if packing == "panels":
        outputs, inputs = PANEL_OUTPUTS, 32 // bits
    else:
        outputs, inputs = 1, {"canonical": 2, "split_128": 128}[packing] if bits == 4 else 1
    if num_outputs % outputs or num_inputs % inputs:
        raise ValueError(
            f"{num_inputs} inputs x {num_outputs} outputs of {bits} bits can't be packed as "
            f"{packing}, which needs multiples of {inputs} x {outputs}"
        )
