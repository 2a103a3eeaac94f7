"""The kinds of attention: for each kind of config its layer, and the state that it keeps.

A new kind is a file of its own and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.attention import (
    Attention,
    AttentionConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.attention_traits import NoAttentionConfig
from configs.base import ExecutionConfig
from configs.compressed_attention import CompressedAttentionConfig
from configs.recurrent_attention import GatedDeltaConfig, Mamba2Config, ShortConvConfig
from model.attention import (
    compressed,
    gated_delta,
    grouped_query,
    latent,
    local_sparse,
    mamba2,
    none,
    recurrent,
    relative,
    short_conv,
)
from model.attention.grouped_query import ReadKeys
from model.attention.indexer import ChosenKeys
from model.layer_state import LayerState, StateParts, StateShape

Shareable = ReadKeys | ChosenKeys
"""What later layers may take of one's attention (configs/shared_keys.py)."""


@dataclass(frozen=True)
class AttentionKind:
    """What a kind of attention brings."""

    layer: Callable[..., Callable[..., tuple[Any, ...]]]
    """(config, execution, norm_eps, out_stddev, gaps) to the layer, which takes (x_BLD, step,
    state) and gives the same shape and the state with the step's tokens."""
    init_state: Callable[[Any, StateShape], LayerState | StateParts]
    """An empty state."""
    visible_keys: Callable[[Any, np.ndarray], np.ndarray]
    """Keys that a query at each place (from 1) has a score with, itself included."""
    mixing_flops: Callable[[Any, np.ndarray], float]
    """Of what is no product with a weight, of a query on average over these places: scores and
    values."""
    init_memory: Callable[[Any, tuple[int, ...], int, str], LayerState] | None = None
    """(config, dims, d_model, dtype) to an empty memory, of kinds that read a stream segment by
    segment (config.memory_tokens)."""
    can_share: bool = False
    """Whether the layer takes what an earlier one read as a fourth argument (configs/shared_keys),
    and gives what it reads itself as a third result."""


def _by_config(layer: Callable[..., Any]) -> Callable[..., Callable[..., tuple[Any, ...]]]:
    """Of a layer that is the same however it is executed."""
    return lambda config, execution, norm_eps, out_stddev, gaps: layer(
        config, norm_eps, out_stddev, name="attention"
    )


KINDS: dict[type, AttentionKind] = {
    AttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: grouped_query.GroupedQueryAttention(
            config, execution, norm_eps, out_stddev, gaps=gaps, name="attention"
        ),
        grouped_query.init_state,
        grouped_query.visible_keys,
        grouped_query.mixing_flops,
        can_share=True,
    ),
    LatentAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: latent.LatentAttention(
            config, execution, out_stddev, name="attention"
        ),
        latent.init_state,
        latent.visible_keys,
        latent.mixing_flops,
        can_share=True,
    ),
    LocalSparseAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: local_sparse.LocalSparseAttention(
            config, execution, out_stddev, name="attention"
        ),
        local_sparse.init_state,
        local_sparse.visible_keys,
        local_sparse.mixing_flops,
    ),
    RelativeAttentionConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: relative.RelativeAttention(
            config, out_stddev, name="attention"
        ),
        relative.init_state,
        relative.visible_keys,
        relative.mixing_flops,
        relative.init_memory,
    ),
    CompressedAttentionConfig: AttentionKind(
        _by_config(compressed.CompressedAttention),
        compressed.init_state,
        compressed.visible_keys,
        compressed.mixing_flops,
    ),
    GatedDeltaConfig: AttentionKind(
        _by_config(gated_delta.GatedDelta),
        gated_delta.init_state,
        recurrent.visible_keys,
        gated_delta.mixing_flops,
    ),
    ShortConvConfig: AttentionKind(
        lambda config, execution, norm_eps, out_stddev, gaps: short_conv.ShortConv(
            config, out_stddev, name="attention"
        ),
        short_conv.init_state,
        short_conv.visible_keys,
        short_conv.mixing_flops,
    ),
    Mamba2Config: AttentionKind(
        _by_config(mamba2.Mamba2),
        mamba2.init_state,
        recurrent.visible_keys,
        mamba2.mixing_flops,
    ),
    NoAttentionConfig: AttentionKind(
        none.absent, none.init_state, none.visible_keys, none.mixing_flops
    ),
}


def attention_layer(
    config: Attention, execution: ExecutionConfig, norm_eps: float, out_stddev: float, gaps: bool
) -> Callable[..., tuple[Any, Any, Any]]:
    """The layer's attention: (x_BLD, step, state of its own kind, what an earlier layer read) to
    the same shape, the state, and what it read itself; None of kinds that share nothing.

    Args:
      gaps: whether positions may skip some inside a document: see kernels/window_attention.
    """
    kind = KINDS[type(config)]
    layer = kind.layer(config, execution, norm_eps, out_stddev, gaps)
    if kind.can_share:
        return layer
    return lambda x_BLD, step, state, _: (*layer(x_BLD, step, state), None)


def init_attention_state(config: Attention, shape: StateShape) -> Any:
    """The empty state of a layer with this attention."""
    return KINDS[type(config)].init_state(config, shape)


def init_attention_memory(
    config: Attention, dims: tuple[int, ...], d_model: int, dtype: str
) -> Any:
    """The empty memory of a layer that reads a stream segment by segment.

    Args:
      dims: those before the tokens', the batch last.
    """
    init_memory = KINDS[type(config)].init_memory
    assert init_memory is not None
    return init_memory(config, dims, d_model, dtype)
