"""The weights of the tiny models whose logits were recorded: drawn by name, so none is stored.

RandomState's streams are frozen (NumPy's compatibility policy), so both sides draw the same.
"""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32; norms and factors near 1; biases, sinks and router biases far from their defaults of
    0; a table of tokens' experts int64, of the first four."""
    if name.endswith("tid2eid"):
        order = np.random.RandomState(zlib.crc32(name.encode())).random_sample((shape[0], 4))
        return np.argsort(order)[:, : shape[1]].astype(np.int64)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        is_scale = "norm" in name and name.endswith("weight")
        is_scale |= name.endswith(("layer_scalar", "router.scale", "per_expert_scale"))
        return 1 + 0.2 * x if is_scale else 0.2 * x
    if name.endswith("_bias"):  # of stacked experts
        return 0.2 * x
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]
    return x * np.float32(fan_in**-0.5)
