"""Product of all rows with one weight, an array or a QTensor: the dense layers of a model."""

from kernels.matmul.api import matmul, reads_as_stored, takes_rows

__all__ = ["matmul", "reads_as_stored", "takes_rows"]
