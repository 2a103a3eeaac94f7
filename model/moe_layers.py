"""The MoE layers of a model, and the place of each in the collections "router", "router_state"
and "params".

A layer of the pattern is named "layer_0", ...: its arrays are stacked over the periods. A
multi-token module's layer is named "multi_token_0", ... and stands alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from configs.architecture import ModelConfig
from configs.feed_forward import MoEConfig


@dataclass(frozen=True)
class MoELayer:
    config: MoEConfig
    path: tuple[str, ...]
    """Keys that lead to it in a collection."""
    periods: int | None
    """Layers stacked in dim 0 of its arrays; None: it is one, and they are not stacked."""

    @property
    def count(self) -> int:
        return self.periods or 1

    def of(self, collection: Any) -> Any:
        """This layer's part of a collection."""
        for key in self.path:
            collection = collection[key]
        return collection

    def stacked(self, tree: Any) -> Any:
        """Its arrays with dim 0 for the layers, whether or not they lie stacked."""
        return tree if self.periods else jax.tree.map(lambda x: x[None], tree)

    def unstacked(self, tree: Any) -> Any:
        return tree if self.periods else jax.tree.map(lambda x: x[0], tree)


def moe_layers(config: ModelConfig) -> dict[str, MoELayer]:
    """The MoE layers by name, in the order of the pattern, multi-token modules last."""
    layers = {}
    for i, spec in enumerate(config.pattern):
        if isinstance(spec.ffn, MoEConfig):
            name = f"layer_{i}"
            path = ("periods", name, "moe")
            layers[name] = MoELayer(spec.ffn, path, config.num_periods)
    extra = config.multi_token
    if extra is not None and isinstance(extra.layer.ffn, MoEConfig):
        for k in range(extra.depth):
            name = f"multi_token_{k}"
            layers[name] = MoELayer(extra.layer.ffn, (name, "layer", "moe"), None)
    return layers


def map_layers(
    config: ModelConfig, collection: Any, change: Callable[[str, MoELayer, Any], Any]
) -> Any:
    """The collection with `change(name, layer, part)` in the place of each MoE layer's part.

    Layers that the collection does not hold are left out.
    """
    for name, layer in moe_layers(config).items():
        collection = _replaced(collection, layer.path, lambda x, n=name, y=layer: change(n, y, x))
    return collection


def _replaced(tree: Any, path: tuple[str, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(tree)
    key, *rest = path
    return tree | {key: _replaced(tree[key], tuple(rest), change)} if key in tree else tree
