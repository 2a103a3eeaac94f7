"""A model's layers one by one, for decoding that leaves or splits the model at its exits.

Give it a model that model/unstacked.py has unstacked, or each step copies its weights out of their
stack. B rows, L length, D d_model, V vocab.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from configs.architecture import LayerSpec
from model.block import Block
from model.cache import BlockCache
from model.transformer import Transformer, Variables


@dataclass(frozen=True)
class Layer:
    spec: LayerSpec
    variables: Callable[[], Variables]
    """Called where they are needed: taking them out of a stack copies them."""
    cache: BlockCache | None


def layers_by_exit(
    model: Transformer, variables: Variables, caches: tuple[BlockCache, ...] | None
) -> list[list[Layer]]:
    """The layers after the prefix in order, in groups that end at an exit.

    Args:
      caches: of the periods, as a model's cache holds them.
    """
    config, params = model.config, variables["params"]["periods"]
    states, layers = variables["router_state"].get("periods", {}), []
    for p, (i, spec) in itertools.product(range(config.num_periods), enumerate(config.pattern)):
        name = f"layer_{i}"
        stacked = {"params": params[name], "router_state": states.get(name, {})}
        cache = None if caches is None else jax.tree.map(lambda x, p=p: x[p], caches[i])
        take = functools.partial(jax.tree.map, lambda x, p=p: x[p], stacked)
        layers.append(Layer(spec, take, cache))
    spacing = len(layers) // config.num_exits
    return [layers[begin : begin + spacing] for begin in range(0, len(layers), spacing)]


def stacked(caches: Sequence[BlockCache], period: int) -> tuple[BlockCache, ...]:
    """Caches of all layers in order as a model's cache holds them."""
    return tuple(
        jax.tree.map(lambda *layers: jnp.stack(layers), *caches[i::period]) for i in range(period)
    )


def run_layers(
    model: Transformer,
    layers: Sequence[Layer],
    caches: Sequence[BlockCache | None],
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    is_exited_BL: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """x and the caches after these layers, None where there were none.

    Tokens that have left keep their state, of which each layer makes their keys.
    """
    new = []
    for layer, cache in zip(layers, caches, strict=True):
        block = Block(layer.spec, model.config, model.execution)
        applied: Any = block.apply(layer.variables(), x_BLD, positions_BL, segments_BL, cache)
        after_BLD, cache = applied
        if is_exited_BL is None:
            x_BLD = after_BLD
        else:
            x_BLD = jnp.where(is_exited_BL[:, :, None], x_BLD, after_BLD)
        new.append(cache)
    return x_BLD, new


def exit_logits(
    model: Transformer, variables: Variables, x_BLD: jax.Array, w_DV: jax.Array
) -> jax.Array:
    """What the model says from a state before, at or after an exit, float32 [B, L, V]."""
    hidden_BLD = cast(jax.Array, model.apply(variables, x_BLD, method="finish"))
    return jnp.einsum("BLD,DV->BLV", hidden_BLD, w_DV, preferred_element_type=jnp.float32)
