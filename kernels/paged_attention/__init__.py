"""Attention of one new token per sequence over keys and values that lie in pages."""

from kernels.paged_attention.api import Implementation, paged_attention

__all__ = ["Implementation", "paged_attention"]
