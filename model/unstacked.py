"""The same model with weights of its own for each layer, for decoding.

Training stacks the weights of equal layers and scans over them, so that compile time does not grow
with depth. A program for one token does little with each weight, and XLA on CPU copies a layer's
weights out of the stack before it multiplies by them, which doubles what it reads. A pattern of all
layers, repeated once, has nothing to copy.
"""

import dataclasses
from typing import Any

import jax

from configs.architecture import ModelConfig
from model.step import Preference
from model.transformer import Transformer, Variables


def unstack(model: Transformer, variables: Variables) -> tuple[Transformer, Variables]:
    """A model whose pattern is all its layers once, exits where they were, and its variables.

    The weights of the layers are copied; the rest is shared. A model that is so already is given
    back.
    """
    config = model.config
    if config.num_periods == 1:
        return model, variables
    split = {
        collection: tree | {"periods": split_periods(tree["periods"], len(config.pattern))}
        if "periods" in tree
        else tree
        for collection, tree in variables.items()
    }
    return unstacked(model), split


def unstacked(model: Transformer) -> Transformer:
    """The model of `unstack`."""
    if model.config.num_periods == 1:
        return model
    return Transformer(unstacked_config(model.config), model.execution)


def unstacked_config(config: ModelConfig) -> ModelConfig:
    """The same model with all its layers as a pattern of their own."""
    return dataclasses.replace(
        config,
        pattern=config.pattern * config.num_periods,
        exit_spacing=config.exit_spacing or len(config.pattern),
    )


def unstack_preference(model: Transformer, preference: Preference) -> Preference:
    """The preference for experts as the unstacked model takes it."""
    return split_periods(preference, len(model.config.pattern))


def split_periods(layers: dict[str, Any], period: int) -> dict[str, Any]:
    """{"layer_i": arrays [periods, ...]} as {"layer_j": arrays [1, ...]}, j = p * period + i.

    Args:
      period: layers of the pattern; some of them may be missing.
    """
    split = {}
    for name, tree in layers.items():
        i = int(name.removeprefix("layer_"))
        for p in range(jax.tree.leaves(tree)[0].shape[0]):
            split[f"layer_{p * period + i}"] = jax.tree.map(lambda x, p=p: x[p : p + 1], tree)
    return split
