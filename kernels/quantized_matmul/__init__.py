"""Products with quantised weights, plain or by groups of rows, and the gated pair of a SwiGLU."""

from kernels.quantized_matmul.api import (
    Activations,
    Implementation,
    quantized_matmul,
    quantized_swiglu,
)

__all__ = ["Activations", "Implementation", "quantized_matmul", "quantized_swiglu"]
