"""Experts outside the device, and how many of them are inside: stores, slots, settings.

E experts, R slots.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import ModelConfig
from configs.checks import require
from configs.feed_forward import MoEConfig
from infer.expert_cache import Policy


@dataclass(frozen=True)
class Paging:
    """How experts are paged."""

    share: float
    """Of each layer's experts, resident."""
    policy: Policy = "lfu"
    has_forecast: bool = True
    directory: Path | None = None
    """Where the experts' files are made; None keeps them in the host's memory."""
    records: bool = False
    """Whether all that is asked for is remembered, for Belady's rule; a server would grow by it."""

    def __post_init__(self) -> None:
        require(
            0 < self.share <= 1, f"resident experts {self.share} must be a share above 0, 1 at most"
        )

    def num_slots(self, config: MoEConfig) -> int:
        """
        Raises:
          UserError: fewer than a token goes to.
        """
        slots = min(max(round(self.share * config.num_experts), 1), config.num_experts)
        top_k = config.router.top_k
        require(
            slots >= top_k,
            f"resident experts {self.share:g} of {config.num_experts} are {slots}, and a token "
            f"goes to {top_k}: give {top_k / config.num_experts:g} or more",
        )
        return slots


def check_paging(config: ModelConfig, paging: Paging) -> None:
    """
    Raises:
      UserError: a model without experts, or whose layers can't run one by one.
    """
    layers = [spec.ffn for spec in config.pattern if isinstance(spec.ffn, MoEConfig)]
    require(bool(layers), "this model has no experts to page: leave resident experts out")
    for layer in layers:
        paging.num_slots(layer)
    require(
        not config.has_shared_keys and config.per_layer_embeddings is None,
        "experts are not paged for layers that read the keys of others (shares_keys, "
        "shares_indexer) or vectors of their own (per_layer_embeddings): leave resident experts "
        "out",
    )
    for spec in (*config.prefix, *config.pattern):
        require(
            spec.depth is None,
            "a Mixture-of-Depths layer passes some tokens by, and its experts can't be paged: "
            "leave resident experts out",
        )


@dataclass
class ExpertStore:
    """All experts of one layer, outside the device: by name, arrays whose dim 0 is the expert."""

    arrays: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, weight: Any, directory: Path | None, layer: str) -> None:
        """Takes an array or QTensor [1, E, ...]; into a file for each array where there is a
        directory."""
        flat, tree = jax.tree.flatten(weight)
        kept = []
        for i, array in enumerate(flat):
            host = np.asarray(array)[0]
            path = None if directory is None else directory / f"{layer}.{name}.{i}"
            kept.append(np.array(host) if path is None else _in_file(host, path))
        self.arrays[name] = jax.tree.unflatten(tree, kept)

    def expert(self, number: int) -> dict[str, Any]:
        return jax.tree.map(lambda x: np.ascontiguousarray(x[number]), self.arrays)


def _in_file(array: np.ndarray, path: Path) -> np.ndarray:
    """The array in a file that the system reads and forgets page by page."""
    written = np.memmap(path, np.uint8, "w+", shape=(array.nbytes,))
    written[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    written.flush()
    read = np.memmap(path, np.uint8, "r", shape=(array.nbytes,))
    return read.view(array.dtype).reshape(array.shape)


def slots_of(config: ModelConfig, layer: str, paging: Paging) -> int:
    spec = config.pattern[int(layer.removeprefix("layer_")) % len(config.pattern)]
    assert isinstance(spec.ffn, MoEConfig)
    return paging.num_slots(spec.ffn)


def empty_slots(weight: Any, num_slots: int) -> Any:
    """Of all experts' [1, E, ...]: [1, R, ...] of zeros."""
    return jax.tree.map(lambda x: jnp.zeros((1, num_slots, *x.shape[2:]), x.dtype), weight)
