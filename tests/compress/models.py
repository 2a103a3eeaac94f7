"""Tiny models and text for the tests of compression."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.model_folder import write_model_folder
from compress.layered import LayeredModel, layered
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig, RouterConfig
from model.step import Step, make_step
from model.transformer import Transformer, Variables, init_variables
from tests import tiny
from tests.checkpoint import tiny_folder

ATTENTION = tiny.attention(window_size=None, num_sink_tokens=0)
MOE = tiny.moe(router=RouterConfig(top_k=2, balance="loss_free", bias_rate=1e-3))
MIXED = tiny.model(
    pattern=(
        LayerSpec(attention=ATTENTION, ffn=MOE),
        LayerSpec(attention=ATTENTION, ffn=DenseConfig(d_ff=48)),
    )
)
"""A layer of experts and a dense one."""
DENSE = tiny.model(
    pattern=(LayerSpec(attention=ATTENTION, ffn=DenseConfig(d_ff=64)),), tie_embeddings=True
)
"""Two equal dense layers, as Llama has them."""


def drawn(config: ModelConfig) -> Variables:
    """Variables of a seed, in numpy, that may be written to."""
    variables = jax.jit(lambda: init_variables(Transformer(config), 0))()
    return jax.tree.map(np.array, variables)


def as_layers(config: ModelConfig, variables: Variables) -> LayeredModel:
    return layered(Transformer(config), variables)


def steps(rows: int = 4, length: int = 32, seed: int = 0) -> list[Step]:
    """One batch of random tokens."""
    tokens_BL = np.random.default_rng(seed).integers(0, 300, (rows, length))
    positions_BL = np.tile(np.arange(length), (rows, 1))
    return [make_step(jnp.asarray(tokens_BL, jnp.int32), jnp.asarray(positions_BL, jnp.int32))]


def write_folder(folder: Path, config: ModelConfig = DENSE) -> Variables:
    """A model folder with a tokenizer."""
    variables = drawn(config)
    write_model_folder(folder, config, variables)
    tokenizer = tiny_folder.byte_level()
    tiny_folder.write_tokenizer(folder, tokenizer, tokenizer_config={"eos_token": "<|endoftext|>"})
    return variables


def write_text(path: Path) -> Path:
    """Enough text to calibrate and to measure on."""
    words = np.random.default_rng(0).choice(tiny_folder.TEXT.split(), 4000)
    path.write_text("\n".join(" ".join(line) for line in words.reshape(-1, 8)) + "\n")
    return path
