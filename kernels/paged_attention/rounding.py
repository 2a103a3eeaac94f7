"""Keys, values and latents in int8, one scale to a position and head: what int8 pages hold."""

import jax

from kernels.quantize import quantize


def quantize_positions(x: jax.Array, scale_dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    """Returns x in int8, [..., C], and its scales, [...]: x is about values * scales[..., None].

    A position that is appended rounds by itself, whatever its page holds already. The largest of
    its C channels becomes 127.

    Args:
      x: float [..., C]; as keys and values [B, G, C], as latents [B, C].
      scale_dtype: float32, or bfloat16, rounded up.
    Raises:
      ValueError: another scale dtype, or, where x is known, values that are not finite.
    Numerics: |x - values * scales| <= scales / 2.
    """
    rounded = quantize(x[..., None], "int8", block_size=x.shape[-1], scale_dtype=scale_dtype)
    return rounded.values[..., 0, :], rounded.scales[..., 0, 0]
