"""How often the loops run whose length only the data decide: those over the row tiles of an expert.

kernels/grouped_matmul/xla.py runs ceil(rows of the expert / tile) times for each expert. Planning
takes the balanced load, every expert the same rows, and counts rows / tile, not rounded up; real
loads are less even, and a last tile is on average half empty. An expert with few rows (decoding)
runs one tile if it gets any: with chance 1 - exp(-rows), as if tokens chose independently.
"""

import math
from collections.abc import Iterator

from configs.base import RunConfig
from configs.feed_forward import MoEConfig
from kernels.grouped_matmul.xla import tile_rows
from parallel.expert import rows_per_peer


def expected_trips(run: RunConfig, num_tokens: int) -> float:
    """Tiles that an expert runs when the load is balanced; 0 for a model without experts.

    Args:
      num_tokens: that go through the model at once, on all devices.
    Raises:
      NotImplementedError: MoE layers of the model differ in it.
    """
    trips = {_trips(run, ffn, tokens) for ffn, tokens in _expert_layers(run, num_tokens)}
    if len(trips) > 1:
        raise NotImplementedError(
            f"the model's MoE layers would run {sorted(trips)} tiles per expert, and the compiled "
            "program doesn't say which loop is whose: plan a model with one kind of MoE layer"
        )
    return trips.pop() if trips else 0.0


def _expert_layers(run: RunConfig, num_tokens: int) -> Iterator[tuple[MoEConfig, float]]:
    for spec in run.model.layer_kinds:
        if isinstance(spec.ffn, MoEConfig):
            capacity = 1.0 if spec.depth is None else spec.depth.capacity
            yield spec.ffn, num_tokens * capacity


def _trips(run: RunConfig, ffn: MoEConfig, num_tokens: float) -> float:
    """Rows of an expert over the rows of a tile, or one tile for the few."""
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
    return max(rows_per_expert / tile_rows(rows, local), 1 - math.exp(-rows_per_expert))
