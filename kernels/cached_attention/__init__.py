"""Attention of new tokens over what a layer keeps of their sequences: rows of slots, or pages."""

from kernels.cached_attention.api import Implementation, cached_attention

__all__ = ["Implementation", "cached_attention"]
