"""Latent attention's kv_b in newer GGUF files: the parts of keys and values apart, as llama.cpp
computes with them.

N nope_head_dim, V value_head_dim, R latent_rank, H heads; attn_kv_b is [H * (N + V), R], and
attn_k_b [H, R, N] and attn_v_b [H, V, R] are its rows head by head.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from checkpoint.gguf_fused import SplitTensors
from configs.checks import UserError
from formats.gguf.writer import Tensor

JOINED, KEYS, VALUES = ".attn_kv_b.weight", ".attn_k_b.weight", ".attn_v_b.weight"


class JoinedTensors:
    """A file's tensors with each attn_k_b and attn_v_b as one attn_kv_b; others as they are."""

    def __init__(self, file: SplitTensors) -> None:
        """
        Raises:
          UserError: one of a pair is missing, or they don't fit each other.
        """
        self._file = file
        self._shapes = dict(file.shapes)
        for name in file.shapes:
            if name.endswith(KEYS):
                self._join(name.removesuffix(KEYS))

    def _join(self, layer: str) -> None:
        keys = self._shapes.pop(layer + KEYS)
        values = self._shapes.pop(layer + VALUES, None)
        is_pair = values is not None and len(keys) == len(values) == 3
        is_pair = is_pair and layer + JOINED not in self._shapes
        if values is None or not is_pair or (keys[0], keys[1]) != (values[0], values[2]):
            raise UserError(
                f"{self._file.path} has {layer}{KEYS} of shape {keys} and {layer}{VALUES} of "
                f"shape {values}, expected [heads, rank, width] and [heads, width, rank], and no "
                f"{layer}{JOINED}"
            )
        self._shapes[layer + JOINED] = (keys[0] * (keys[2] + values[1]), keys[1])

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file(self, name: str) -> Path:
        return self._file.file(
            name.replace(JOINED, KEYS) if name not in self._file.shapes else name
        )

    def read(self, name: str) -> np.ndarray:
        if name in self._file.shapes:
            return self._file.read(name)
        layer = name.removesuffix(JOINED)
        keys_HRN, values_HVR = self._file.read(layer + KEYS), self._file.read(layer + VALUES)
        joined = np.concatenate([keys_HRN.transpose(0, 2, 1), values_HVR], axis=1)
        return joined.reshape(self._shapes[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self._file.shapes:
            return self._file.read_rows(name, start, stop)
        return self.read(name)[start:stop]


def split(tensors: Iterable[Tensor], nope_head_dim: int, value_head_dim: int) -> Iterator[Tensor]:
    """Each attn_kv_b as the two that llama.cpp loads; others as they are. A pair's tensor is read
    twice.
    """
    width = nope_head_dim + value_head_dim
    for name, shape, read in tensors:
        if not name.endswith(JOINED):
            yield name, shape, read
            continue
        layer, rank = name.removesuffix(JOINED), shape[1]
        heads = shape[0] // width

        def keys(read=read, heads=heads) -> np.ndarray:
            kv = read().reshape(heads, width, -1)
            return np.ascontiguousarray(kv[:, :nope_head_dim].transpose(0, 2, 1))

        def values(read=read, heads=heads) -> np.ndarray:
            return np.ascontiguousarray(read().reshape(heads, width, -1)[:, nope_head_dim:])

        assert math.prod(shape) == heads * width * rank
        yield layer + KEYS, (heads, rank, nope_head_dim), keys
        yield layer + VALUES, (heads, value_head_dim, rank), values
