"""The loss of the multi-token modules (DeepSeek-V3, 2024, section 2.2, eq. 24 and 25).

At place t, module k predicts the token k + 1 places ahead: what is the next token at place t + k.
So it has the targets, and whatever else the objective reads, of place t + k. A place counts where
the tokens up to k + 1 ahead lie in its own document, as far as the row shows them.

B batch, L length, D d_model, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp

from configs.architecture import MultiTokenConfig
from model.multi_token import ahead
from model.step import document_segments
from train.losses import ChunkLoss, chunked_loss


def targets_ahead(targets_BL: jax.Array, positions_BL: jax.Array, k: int) -> jax.Array:
    """Module k's target at each place; -1 where it has none, int32 [B, L]."""
    segments_BL = document_segments(positions_BL)
    place_L = jnp.arange(targets_BL.shape[1])
    is_counted_BL = (place_L + k < len(place_L))[None]
    for places in (k, k + 1):  # the token that was read, and the one to predict
        is_same_BL = ahead(segments_BL, places) == segments_BL
        is_counted_BL &= is_same_BL | (place_L + places >= len(place_L))[None]
    return jnp.where(is_counted_BL, ahead(targets_BL, k), -1)


def count_ahead(
    targets_BL: jax.Array, positions_BL: jax.Array, config: MultiTokenConfig | None
) -> list[jax.Array]:
    """Places that count for each module, float32, at least 1; empty without modules."""
    depth = 0 if config is None else config.depth
    targets = [targets_ahead(targets_BL, positions_BL, k + 1) for k in range(depth)]
    return [jnp.maximum((x >= 0).sum(), 1).astype(jnp.float32) for x in targets]


def multi_token_loss(
    chunk_loss: ChunkLoss,
    sown: dict[str, tuple[jax.Array]],
    w_DV: jax.Array,
    inputs: dict[str, Any],
    positions_BL: jax.Array,
    shared: Any,
    num_chunks: int,
    num_ahead: list[jax.Array],
) -> jax.Array:
    """The objective per counted place, averaged over the modules; float32.

    Args:
      sown: the collection "multi_token": each module's hidden states.
      inputs: what chunk_loss reads at each place, for the next token.
      num_ahead: counted places of the whole batch, of which this may be a part.
    """
    total = jnp.float32(0.0)
    for i, count in enumerate(num_ahead):
        moved = jax.tree.map(lambda x, k=i + 1: ahead(x, k), inputs)
        moved["targets"] = targets_ahead(inputs["targets"], positions_BL, i + 1)
        (hidden_BLD,) = sown[f"hidden_{i}"]
        loss, _ = chunked_loss(chunk_loss, hidden_BLD, w_DV, moved, shared, num_chunks)
        total += loss / count
    return total / max(len(num_ahead), 1)
