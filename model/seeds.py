"""Keys of a run's seed."""

import jax

KEY_BITS = 32
"""Bits of a seed that jax.random.key reads; it ignores the others without a word."""


def seed_key(seed: int) -> jax.Array:
    """A key that depends on all 63 bits of a seed; below 2**32 it is jax.random.key's own."""
    high, low = divmod(seed, 2**KEY_BITS)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key
