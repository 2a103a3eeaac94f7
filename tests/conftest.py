"""Tests run on eight simulated CPU devices, with JAX as strict as it gets."""

import os

import jax

os.environ.setdefault("NPROC", "16")  # threads for the collectives of eight devices on few cores
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
