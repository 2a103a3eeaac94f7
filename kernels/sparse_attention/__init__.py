"""Attention over a window and O(log n) places before it: powers of two, or dyadic summaries."""

from kernels.sparse_attention.api import Implementation, power_attention, summary_attention
from kernels.sparse_attention.cached import cached_power_attention, cached_summary_attention
from kernels.sparse_attention.reference import num_edges
from kernels.sparse_attention.tree import Nodes, empty_nodes, rebuilt, updated

__all__ = [
    "Implementation",
    "Nodes",
    "cached_power_attention",
    "cached_summary_attention",
    "empty_nodes",
    "num_edges",
    "power_attention",
    "rebuilt",
    "summary_attention",
    "updated",
]
