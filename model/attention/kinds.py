"""The kinds of attention: for each kind of config its layer, and the state that it keeps.

A new kind is a file of its own and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.attention import (
    Attention,
    AttentionConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.base import ExecutionConfig
from model.attention import grouped_query, latent, local_sparse, relative
from model.layer_state import LayerState, StateShape


@dataclass(frozen=True)
class AttentionKind:
    """What a kind of attention brings."""

    layer: Callable[..., Callable[..., tuple[Any, Any]]]
    """(config, execution, norm_eps, out_stddev, gaps) to the layer, which takes (x_BLD, step,
    state) and gives the same shape and the state with the step's tokens."""
    init_state: Callable[[Any, StateShape], LayerState]
    """An empty state."""


KINDS: dict[type, AttentionKind] = {
    AttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: grouped_query.GroupedQueryAttention(
            config, execution, norm_eps, out_stddev, gaps=gaps, name="attention"
        ),
        grouped_query.init_state,
    ),
    LatentAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: latent.LatentAttention(
            config, execution, out_stddev, name="attention"
        ),
        latent.init_state,
    ),
    LocalSparseAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: local_sparse.LocalSparseAttention(
            config, execution, out_stddev, name="attention"
        ),
        local_sparse.init_state,
    ),
    RelativeAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: relative.RelativeAttention(
            config, out_stddev, name="attention"
        ),
        relative.init_state,
    ),
}


def attention_layer(
    config: Attention, execution: ExecutionConfig, norm_eps: float, out_stddev: float, gaps: bool
) -> Callable[..., tuple[Any, Any]]:
    """The layer's attention, which takes and returns its own kind of state.

    Args:
      gaps: whether positions may skip some inside a document: see kernels/window_attention.
    """
    return KINDS[type(config)].layer(config, execution, norm_eps, out_stddev, gaps)


def init_attention_state(config: Attention, shape: StateShape) -> Any:
    """The empty state of a layer with this attention."""
    return KINDS[type(config)].init_state(config, shape)


def init_attention_memory(
    config: Attention, dims: tuple[int, ...], d_model: int, dtype: str
) -> relative.SegmentMemory:
    """The empty memory of a layer that reads a stream segment by segment.

    Args:
      dims: those before the tokens', the batch last.
    """
    assert isinstance(config, RelativeAttentionConfig)
    return relative.init_memory(config, dims, d_model, dtype)
