"""Two int4 in a byte, in the orders that kernels unpack without moving values between lanes.

`canonical`: byte b of a row holds inputs 2b (low nibble) and 2b + 1: what checkpoints keep.
`split_S` (S = 32 for the CPU, 128 for Pallas-Triton): within every S inputs, byte b holds inputs b
(low) and b + S/2 (high), so that masking a vector of bytes gives S/2 neighbours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.quantize.qtensor import Packing, QTensor

SPLITS: dict[Packing, int] = {"canonical": 2, "split_32": 32, "split_128": 128}
"""Inputs after which the order repeats."""


def pack_nibbles(values: jax.Array, packing: Packing) -> jax.Array:
    """int8 [..., K] in -8..7 as uint8 [..., K/2].

    Raises:
      ValueError: K is not a multiple of the order's period.
    """
    pairs = jnp.stack(jnp.split(_periods(values, packing), 2, axis=-1))
    low, high = pairs.astype(jnp.uint8) & 0xF
    return (low | (high << 4)).reshape(*values.shape[:-1], values.shape[-1] // 2)


def unpack_nibbles(packed: jax.Array, packing: Packing) -> jax.Array:
    """The inverse of pack_nibbles: uint8 [..., K/2] as int8 [..., K]."""
    half = SPLITS[packing] // 2
    bytes_ = packed.reshape(*packed.shape[:-1], packed.shape[-1] // half, half)
    nibbles = jnp.concatenate([bytes_ & 0xF, bytes_ >> 4], axis=-1).astype(jnp.int8)
    signed = jnp.where(nibbles > 7, nibbles - 16, nibbles)
    return signed.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def repack(weight: QTensor, packing: Packing) -> QTensor:
    """The same weights in another order; only int4 has more than one, others return as they are."""
    if weight.format != "int4" or weight.packing == packing:
        return weight
    values = pack_nibbles(unpack_nibbles(weight.values, weight.packing), packing)
    return dataclasses.replace(weight, values=values, packing=packing)


def _periods(values: jax.Array, packing: Packing) -> jax.Array:
    """[..., K] as [..., K / period, period]."""
    period, num_inputs = SPLITS[packing], values.shape[-1]
    if num_inputs % period:
        raise ValueError(
            f"{num_inputs} inputs can't be packed as {packing}, which needs a multiple of {period}"
        )
    return values.reshape(*values.shape[:-1], num_inputs // period, period)
