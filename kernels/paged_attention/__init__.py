"""Attention of one new token per sequence over keys and values, or latents, that lie in pages."""

from kernels.paged_attention.api import Implementation, paged_attention
from kernels.paged_attention.latent import paged_latent_attention
from kernels.paged_attention.rounding import quantize_positions

__all__ = ["Implementation", "paged_attention", "paged_latent_attention", "quantize_positions"]
