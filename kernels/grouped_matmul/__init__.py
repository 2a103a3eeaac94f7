"""Matrix product of each group of rows with its own matrix: the work of routed experts."""

from kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.request import GATE_AND_UP, Activations, Implementation

__all__ = ["GATE_AND_UP", "Activations", "Implementation", "grouped_matmul", "grouped_swiglu"]
