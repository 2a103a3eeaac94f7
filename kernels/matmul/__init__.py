"""Product of all rows with one weight, an array or a QTensor: the dense layers of a model."""

from kernels.matmul.api import matmul

__all__ = ["matmul"]
