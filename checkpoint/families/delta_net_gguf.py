"""The tensors of Qwen's delta nets, and of the attention beside them, in llama.cpp's files.

Letters are those of delta_net.py.
"""

import dataclasses

import numpy as np

from checkpoint.families.delta_net import FUSED_PROJECTIONS, IN_DELTA, delta_of, gated_query
from checkpoint.gguf_values import NEGATIVE_RATE
from checkpoint.gguf_weight_maps import (
    AFTER_ATTENTION,
    BLOCK,
    EMBEDDING,
    NORMS,
    QK_NORM,
    grouped_query,
    zero_centered,
)
from checkpoint.weight_map import Order, Row
from configs.architecture import LayerSpec

AROUND = zero_centered((*EMBEDDING, NORMS[0], AFTER_ATTENTION))
ATTENTION = (*gated_query(grouped_query(), f"{BLOCK}.attn_q"), *zero_centered(QK_NORM))


def _tiled_heads(size: int, layer: LayerSpec) -> np.ndarray:
    """Of each head of values, its place where the first of all groups come first, then the second
    of all: llama.cpp's Qwen3.5 has them so. A group shares a head of keys."""
    groups = delta_of(layer).num_key_heads or size
    heads = np.arange(size)
    each = size // groups
    return heads % each * groups + heads // each


def _tiled_channels(size: int, layer: LayerSpec) -> np.ndarray:
    """The same of the convolution's channels: queries and keys, then values head by head."""
    c = delta_of(layer)
    heads, width = _tiled_heads(c.num_heads, layer), c.value_head_dim
    values = heads[:, None] * width + np.arange(width)
    first = 2 * c.key_width
    assert size == first + values.size
    return np.concatenate([np.arange(first), first + values.reshape(-1)])


def _core(heads: Order | None, channels: Order | None) -> tuple[Row, ...]:
    """
    Args:
      heads, channels: the order of heads of values, and of what the convolution reads.
    """
    net = "layers.*.attention"
    return (
        Row(f"{net}.qkv", f"{BLOCK}.attn_qkv.weight", "c d -> d c", channels),
        Row(
            f"{net}.gate",
            f"{BLOCK}.attn_gate.weight",
            "(c x) d -> d c x",
            heads,
            requires=IN_DELTA,
        ),
        Row(f"{net}.conv", f"{BLOCK}.ssm_conv1d.weight", "c t -> t c", channels),
        Row(f"{net}.decay_bias", f"{BLOCK}.ssm_dt.bias", "c -> c 0", heads),
        Row(IN_DELTA, f"{BLOCK}.ssm_a", "c -> c", heads, values=NEGATIVE_RATE),
        Row(f"{net}.norm.scale", f"{BLOCK}.ssm_norm.weight", "c -> c"),
        Row(
            f"{net}.o",
            f"{BLOCK}.ssm_out.weight",
            "d (c x) -> c x d",
            heads,
            requires=IN_DELTA,
        ),
    )


FUSED = (
    *_core(None, None),
    *(
        dataclasses.replace(row, name=f"{BLOCK}.ssm_ba.weight")
        for row in FUSED_PROJECTIONS
        if row.parameter.endswith((".beta", ".decay"))
    ),
)
"""Qwen3-Next's in llama.cpp's files, where queries, keys and values are no more side by side."""
SEPARATE = (
    *_core(_tiled_heads, _tiled_channels),
    Row("layers.*.attention.beta", f"{BLOCK}.ssm_beta.weight", "c d -> d c", _tiled_heads),
    Row("layers.*.attention.decay", f"{BLOCK}.ssm_alpha.weight", "c d -> d c 0", _tiled_heads),
)
"""Qwen3.5's."""
