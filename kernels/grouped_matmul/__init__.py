"""Matrix product of each group of rows with its own matrix: the work of routed experts."""

from kernels.grouped_matmul.api import Implementation, grouped_matmul

__all__ = ["Implementation", "grouped_matmul"]
