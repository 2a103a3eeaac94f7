"""Weights of few bits: the QTensor, its formats, and the orders in which backends keep them."""

from kernels.quantize.api import dequantize, quantize, take_outputs
from kernels.quantize.formats import (
    QUANTIZED,
    WeightFormat,
    choose_block_size,
    default_block_size,
    preferred_packing,
    quantizable_reason,
    scale_dtype,
    to_format,
)
from kernels.quantize.packing import repack
from kernels.quantize.qtensor import FORMATS, Format, MatrixDims, Packing, QTensor

__all__ = [
    "FORMATS",
    "QUANTIZED",
    "Format",
    "MatrixDims",
    "Packing",
    "QTensor",
    "WeightFormat",
    "choose_block_size",
    "default_block_size",
    "dequantize",
    "preferred_packing",
    "quantizable_reason",
    "quantize",
    "repack",
    "scale_dtype",
    "take_outputs",
    "to_format",
]
