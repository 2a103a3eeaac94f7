"""Data-dependent loops: the rows of an expert, and the trip counts of loops over their tiles.

kernels/grouped_matmul/xla.py runs ceil(rows of the expert / tile) times for each expert. Planning
takes the balanced load, every expert the same rows, and counts rows / tile, not rounded up; real
loads are less even, and a last tile is on average half empty. An expert with few rows (decoding)
runs one tile if it gets any: with chance 1 - exp(-rows), as if tokens chose independently.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from configs.base import RunConfig
from configs.feed_forward import MoEConfig
from kernels.grouped_matmul.xla import tile_rows
from parallel.expert import rows_per_peer


class Load(NamedTuple):
    """What an expert gets when the load is balanced; zeros for a model without experts."""

    rows: float
    trips: float
    """Tiles that it runs in kernels/grouped_matmul/xla.py."""


def balanced_load(run: RunConfig, num_tokens: int) -> Load:
    """
    Args:
      num_tokens: that go through the model at once, on all devices.
    Raises:
      NotImplementedError: MoE layers of the model differ in it.
    """
    loads = {_load(run, ffn, tokens) for ffn, tokens in _expert_layers(run, num_tokens)}
    if len(loads) > 1:
        raise NotImplementedError(
            f"the model's MoE layers would give an expert {sorted(x.rows for x in loads)} rows, "
            "and the compiled program doesn't say which loop is whose: plan a model with one kind "
            "of MoE layer"
        )
    return loads.pop() if loads else Load(0.0, 0.0)


def _expert_layers(run: RunConfig, num_tokens: int) -> Iterator[tuple[MoEConfig, float]]:
    for spec in run.model.layer_kinds:
        if isinstance(spec.ffn, MoEConfig):
            capacity = 1.0 if spec.depth is None else spec.depth.capacity
            yield spec.ffn, num_tokens * capacity


def _load(run: RunConfig, ffn: MoEConfig, num_tokens: float) -> Load:
    """Trips: rows of an expert over the rows of a tile, or one tile for the few."""
    shards, top_k = run.mesh.expert, ffn.router.top_k
    tokens = -(-num_tokens // (run.mesh.data * shards))  # of one device
    if run.execution.transport == "all_to_all" and shards > 1:
        assert run.execution.capacity_factor is not None
        factor = run.execution.capacity_factor
        rows = shards * rows_per_peer(int(tokens), top_k, factor, shards)
    else:
        rows = int(tokens) * shards * top_k
    local = ffn.num_experts // shards
    rows_per_expert = tokens * ffn.router.mean_k / local
    trips = max(rows_per_expert / tile_rows(rows, local), 1 - math.exp(-rows_per_expert))
    return Load(rows_per_expert, trips)
