"""llama.cpp's blocks of 32 weights, made of codes and scales that are given.

Q8_0  float16 scale, 32 codes of a byte
Q4_0  float16 scale, 32 codes from -8 to 7 as nibbles: byte j has code j low and j + 16 high
Q4_1  float16 scale, float16 offset, 32 codes from 0 to 15, as in Q4_0
"""

from typing import Literal

import numpy as np

BLOCK = 32
BlockKind = Literal["Q8_0", "Q4_0", "Q4_1"]


def encode_blocks(
    kind: BlockKind,
    codes_NK: np.ndarray,
    scales_NS: np.ndarray,
    offsets_NS: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of rows, uint8 [N, bytes of a row].

    Args:
      codes_NK: int8, of K = 32 S inputs.
      scales_NS: values of float16.
      offsets_NS: of Q4_1 alone.
    """
    assert (offsets_NS is not None) == (kind == "Q4_1"), kind
    blocks = codes_NK.reshape(len(codes_NK), -1, BLOCK)
    steps = [scales_NS] if offsets_NS is None else [scales_NS, offsets_NS]
    head = np.stack([x.astype("<f2") for x in steps], axis=-1)
    heads = np.ascontiguousarray(head).view(np.uint8)
    if kind == "Q8_0":
        body = blocks.astype(np.int8).view(np.uint8)
    else:
        nibbles = (blocks + (8 if kind == "Q4_0" else 0)).astype(np.uint8)
        body = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    return np.concatenate([heads, body], axis=-1).reshape(len(codes_NK), -1)
