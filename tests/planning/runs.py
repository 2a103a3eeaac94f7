"""Small runs to plan, and what the tests count by hand about them."""

import dataclasses
from pathlib import Path

from configs.base import ExecutionConfig, MeshConfig, RunConfig
from tests import tiny

PERIODS, ROWS, LENGTH = 6, 8, 32
READABLE = ExecutionConfig(logits_chunks=2, grouped_matmul="xla", window_attention="xla")
"""Plain XLA, as on a GPU: native kernels would hide their work from the program's text."""


def moe_run(remat: str = "none", **mesh: int) -> RunConfig:
    """Six times a windowed MoE layer and a dense one: scanned, not unrolled."""
    base = tiny.run(Path("."), mesh=MeshConfig(**mesh), batch_size=ROWS)
    execution = dataclasses.replace(READABLE, remat=remat)
    return dataclasses.replace(base, model=tiny.model(num_layers=2 * PERIODS), execution=execution)


def moe_step_flops(devices: int, computed: float = 1.0) -> float:
    """FLOPs of one training step of `moe_run` on one of the devices that share its rows.

    Two per weight and token forward, four backward. D = 32, 4 query and 2 key/value heads of 8, 8
    experts of width 16 and a shared one, two experts per token, dense width 48, vocabulary 300. A
    row of 32 is one block of the attention: all 32 x 32 scores are made.

    Args:
      computed: rows that experts compute over those that they get: a tile is computed whole.
    """
    tokens = ROWS * LENGTH / devices
    attention = 32 * 4 * 8 + 2 * 32 * 2 * 8 + 4 * 8 * 32
    expert = 3 * 32 * 16
    layers = 2 * attention + (32 * 8 + expert + 2 * computed * expert) + 3 * 32 * 48
    scores = 2 * (2 * LENGTH * 4 * 8)  # in two layers: with keys, and of values, per token
    return 6 * tokens * (PERIODS * (layers + scores) + 32 * 300)


def wide_run() -> RunConfig:
    """A run whose activations, 100 MB and more on each of two devices, outweigh everything else."""
    base = moe_run(data=2)
    data = dataclasses.replace(base.data, seq_len=512)
    model = dataclasses.replace(base.model, context_length=512, d_model=64)
    return dataclasses.replace(base, data=data, model=model, batch_size=16)
