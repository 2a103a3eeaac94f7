"""The tensors of a Mamba-2 layer, which families name alike.

d d_model, h heads, c a head's width, n channels of the convolution, t taps.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from checkpoint.gguf_values import NEGATIVE_RATE
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec
from configs.recurrent_attention import Mamba2Config

MIXER = "layers.*.attention"
IN_MAMBA2 = f"{MIXER}.skip"
"""A parameter that every Mamba-2 layer has, and no other attention."""


def rows(module: str) -> tuple[Row, ...]:
    """
    Args:
      module: what the tensors' names begin with.
    """
    entering = f"{module}.in_proj"
    gate, mixed, steps = (_part(i) for i in range(3))
    return (
        *_entering(f"{entering}.weight"),
        Row(f"{MIXER}.gate_bias", f"{entering}.bias", "(h c) -> h c", rows=gate),
        Row(f"{MIXER}.in_bias", f"{entering}.bias", "n -> n", rows=mixed, requires=IN_MAMBA2),
        Row(f"{MIXER}.step_in_bias", f"{entering}.bias", "h -> h", rows=steps),
        Row(f"{MIXER}.conv", f"{module}.conv1d.weight", "n u t -> t n"),
        Row(f"{MIXER}.conv_bias", f"{module}.conv1d.bias", "n -> n"),
        Row(f"{MIXER}.log_rate", f"{module}.A_log", "h -> h"),
        Row(f"{MIXER}.step_bias", f"{module}.dt_bias", "h -> h"),
        Row(IN_MAMBA2, f"{module}.D", "h -> h"),
        Row(f"{MIXER}.norm_scale", f"{module}.norm.weight", "(h c) -> h c"),
        Row(f"{MIXER}.o", f"{module}.out_proj.weight", "d (h c) -> h c d", requires=IN_MAMBA2),
        Row(f"{MIXER}.o_bias", f"{module}.out_proj.bias", "d -> d", requires=IN_MAMBA2),
    )


def _entering(name: str) -> tuple[Row, ...]:
    """The projection of what comes in: gates, what the convolution reads, steps."""
    gate, mixed, steps = (_part(i) for i in range(3))
    return (
        Row(f"{MIXER}.gate", name, "(h c) d -> d h c", rows=gate),
        Row(f"{MIXER}.in", name, "n d -> d n", rows=mixed, requires=IN_MAMBA2),
        Row(f"{MIXER}.step", name, "h d -> d h", rows=steps),
    )


def _groups(layer: LayerSpec) -> int:
    assert isinstance(layer.attention, Mamba2Config)
    return layer.attention.num_groups


def beside(table: Sequence[Row]) -> tuple[Row, ...]:
    """The rows of grouped-query attention as they hold where other layers have Mamba-2."""
    return tuple(dataclasses.replace(row, requires=f"{MIXER}.q") for row in table)


def _part(number: int) -> Callable[[LayerSpec], np.ndarray]:
    """The rows of gates (0), of what the convolution reads (1) or of steps (2) in one tensor."""

    def part(layer: LayerSpec) -> np.ndarray:
        c = layer.attention
        assert isinstance(c, Mamba2Config)
        ends = np.cumsum((0, c.out_width, c.conv_channels, c.num_heads))
        return np.arange(ends[number], ends[number + 1])

    return part


BLOCK = "blk.*"

GGUF_ROWS = (
    *_entering(f"{BLOCK}.ssm_in.weight"),
    Row(f"{MIXER}.conv", f"{BLOCK}.ssm_conv1d.weight", "n t -> t n"),
    Row(f"{MIXER}.conv_bias", f"{BLOCK}.ssm_conv1d.bias", "n -> n"),
    Row(f"{MIXER}.log_rate", f"{BLOCK}.ssm_a", "h u -> h", values=NEGATIVE_RATE),
    Row(f"{MIXER}.step_bias", f"{BLOCK}.ssm_dt.bias", "h -> h"),
    Row(IN_MAMBA2, f"{BLOCK}.ssm_d", "h u -> h"),
    Row(f"{MIXER}.norm_scale", f"{BLOCK}.ssm_norm.weight", "(h c) -> h c", lines=_groups),
    Row(f"{MIXER}.o", f"{BLOCK}.ssm_out.weight", "d (h c) -> h c d", requires=IN_MAMBA2),
)
"""Of llama.cpp's files, whose projections have no biases."""
