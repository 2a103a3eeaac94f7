"""Matrix product of each group of rows with its own matrix: the work of routed experts."""

from kernels.grouped_matmul.api import Implementation, grouped_matmul
from kernels.grouped_matmul.swiglu import grouped_swiglu

__all__ = ["Implementation", "grouped_matmul", "grouped_swiglu"]
