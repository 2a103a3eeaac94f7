"""Adapters drawn by their names: for models whose logits with them PEFT computed."""

import math
import zlib
from typing import Any

import numpy as np

from model.adapters import adapted_matrices
from model.transformer import Transformer

RANK, ALPHA = 2, 6.0


def draw_adapters(model: Transformer) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(a, b) of every matrix that can have an adapter, by its path; the factor is in neither."""
    drawn = {}
    for path, matrix in adapted_matrices(model).items():
        name, shapes = ".".join(path), matrix.shapes(RANK)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        a, b = (rng.normal(size=shapes[x]).astype(np.float32) for x in "ab")
        drawn[name] = a * math.prod(matrix.sizes()[1]) ** -0.5, 0.03 * b
    return drawn


def as_collection(drawn: dict[str, tuple[np.ndarray, np.ndarray]], scale: float = 1.0) -> Any:
    """The collection "adapters" of them."""
    tree: dict[str, Any] = {}
    for name, (a, b) in drawn.items():
        node = tree
        for key in name.split("."):
            node = node.setdefault(key, {})
        node |= {"a": a, "b": scale * b}
    return tree
