"""Weights of few bits: the QTensor, its formats, and the orders in which backends keep nibbles."""

from kernels.quantize.api import dequantize, quantize
from kernels.quantize.packing import repack
from kernels.quantize.qtensor import FORMATS, Format, Packing, QTensor

__all__ = [
    "FORMATS",
    "Format",
    "Packing",
    "QTensor",
    "dequantize",
    "quantize",
    "repack",
]
