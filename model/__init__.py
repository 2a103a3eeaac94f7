"""Functional Flax (linen) language models: one path for training, prefill and decoding."""
