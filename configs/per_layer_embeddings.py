"""Embeddings for each layer: a second table of the vocabulary, of which each layer reads its part.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

from dataclasses import dataclass
from typing import Literal

from configs.checks import require_positive


@dataclass(frozen=True, kw_only=True)
class PerLayerEmbeddingConfig:
    """A small vector of the token for each layer, looked up and mixed with a projection of the
    token's embedding, that each layer adds after its feed-forward through a gate (Gemma 3n, 2025;
    Gemma 4's E models). Most of such a model's weights are then looked up and not multiplied by.
    See model/per_layer_embeddings.py."""

    width: int
    """Entries of a layer's vector, W."""
    activation: Literal["swiglu", "geglu"] = "geglu"
    """Of the gate."""

    def __post_init__(self) -> None:
        require_positive(self, "width")

    def table_width(self, num_layers: int) -> int:
        """Of a token's vectors for all layers, side by side."""
        return num_layers * self.width

    def num_layer_parameters(self, d_model: int) -> int:
        """Of a layer: gate, projection and norm."""
        return 2 * d_model * self.width + d_model

    def num_shared_parameters(self, d_model: int, num_layers: int) -> int:
        """Of all layers together, without the table: projection of the embedding and its norm."""
        return self.table_width(num_layers) * d_model + self.width
