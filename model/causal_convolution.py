"""The causal convolution of a few taps, each channel by itself, that some layers mix tokens with.

B batch, L length, T taps, N channels.
"""

import jax
import jax.numpy as jnp


def causal_convolution(
    x_BLN: jax.Array, tail_BTN: jax.Array, taps_TN: jax.Array, positions_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum over taps inside each document, [B, L, N], and the tail for the next tokens.

    Args:
      x_BLN: float32.
      tail_BTN: the inputs of the last T - 1 tokens, the newest last.
      taps_TN: the newest last.
      positions_BL: int32; padding, -1, fills the end of a row and is in no tail.
    """
    past, length = tail_BTN.shape[1], x_BLN.shape[1]
    row = jnp.concatenate([tail_BTN, x_BLN], axis=1)
    out = jnp.zeros_like(x_BLN)
    for back in range(past + 1):
        seen = row[:, past - back : past - back + length]
        seen = jnp.where((positions_BL >= back)[..., None], seen, 0.0)
        out += seen * taps_TN[past - back][None, None]
    count_B = (positions_BL >= 0).sum(axis=1)
    at_BT = count_B[:, None] + jnp.arange(past)[None]
    return out, jnp.take_along_axis(row, at_BT[..., None], axis=1)
