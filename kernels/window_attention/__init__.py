"""Softmax attention with grouped queries, a sliding window, sink tokens and document masks."""

from kernels.window_attention.api import Implementation, window_attention
from kernels.window_attention.reference import masked_attention, visible

__all__ = ["Implementation", "masked_attention", "visible", "window_attention"]
