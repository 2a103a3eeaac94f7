"""Signed integers of few bits side by side in int32, as compressed-tensors' pack-quantized has
them: the first in the lowest bits, each with half its range added.
"""

import numpy as np


def pack_ints(codes_NK: np.ndarray, bits: int) -> np.ndarray:
    """int32 [N, K * bits / 32].

    Args:
      codes_NK: int8, from -2^(bits - 1); K a multiple of 32 / bits.
    """
    each = 32 // bits
    assert codes_NK.shape[1] % each == 0, (codes_NK.shape, bits)
    raised = (codes_NK.astype(np.int64) + (1 << (bits - 1))).astype(np.uint32)
    shifted = raised.reshape(len(raised), -1, each) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)


def unpack_ints(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_ints`: int8 [N, K]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    raised = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    codes = raised.astype(np.int32) - (1 << (bits - 1))
    return codes.reshape(len(packed), -1).astype(np.int8)
