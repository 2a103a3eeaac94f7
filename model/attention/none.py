"""The state of a layer without attention: nothing, of which anything may be asked."""

from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct

from configs.attention_traits import NoAttentionConfig
from model.layer_state import RowsFirst, StateShape


class EmptyState(RowsFirst, struct.PyTreeNode):
    """No arrays: a layer that is a feed-forward alone keeps nothing of its tokens."""

    unrewindable_reason: ClassVar[str | None] = None
    unpageable_reason: ClassVar[str | None] = None
    unmixable_reason: ClassVar[str | None] = None

    def rewind(self, length_R: jax.Array) -> "EmptyState":
        del length_R
        return self

    def logical_axes(self) -> Any:
        return self


def init_state(config: NoAttentionConfig, shape: StateShape) -> EmptyState:
    del config, shape
    return EmptyState()


def visible_keys(config: NoAttentionConfig, places: np.ndarray) -> np.ndarray:
    del config
    return np.zeros_like(places)


def mixing_flops(config: NoAttentionConfig, places: np.ndarray) -> float:
    del config, places
    return 0.0


def absent(*_: Any) -> Any:
    """Blocks leave such a layer's attention out, and never ask for it."""
    raise AssertionError("a layer with attention.kind='none' has no attention to call")
