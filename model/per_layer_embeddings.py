"""Embeddings for each layer (Gemma 3n, 2025; Gemma 4's E models): a second table of the vocabulary.

Of a token with the embedding x, the table's row e and layer l:

    u_l = (RMSNorm(M x / sqrt(D))_l + sqrt(W) e_l) / sqrt(2)
    h_l = h + RMSNorm(P_l (gelu(G_l h) * u_l))

where h is what layer l's feed-forward has left. What a layer reads depends on the token alone, so
nothing of it is kept.

B batch, L length, D d_model, V vocab, N layers, W the vector's width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from kernels.quantize import MatrixDims
from model.layers import RMSNorm, gated, look_up, project, weight


class PerLayerInputs(nn.Module):
    """What all layers read of the step's tokens, [B, L, N, W]."""

    config: PerLayerEmbeddingConfig
    num_layers: int
    vocab_size: int
    norm_eps: float
    has_zero_centered_norms: bool = False

    @nn.compact
    def __call__(self, tokens_BL: jax.Array, x_BLD: jax.Array) -> jax.Array:
        """
        Args:
          x_BLD: the tokens' embeddings, as the first layer reads them.
        """
        width, d_model = self.config.width, x_BLD.shape[-1]
        columns = self.config.table_width(self.num_layers)
        dims = MatrixDims(1, 1, outputs_first=True)
        table_shape, axes = (self.vocab_size, columns), ("vocab", "embed")
        table_VX = weight(self, "table", table_shape, axes, width**-0.5, dims)
        # The factor D^-0.5 stands in the product, and only the norm's eps sees it.
        w_DX = weight(
            self, "projection", (d_model, columns), ("embed", "latent"), 1.0, MatrixDims(1, 1)
        )
        own_BLNW = self._by_layer(look_up(table_VX, tokens_BL, x_BLD.dtype)) * width**0.5
        seen_BLNW = self._by_layer(project("BLD,DX->BLX", x_BLD, w_DX) * d_model**-0.5)
        norm = RMSNorm(self.norm_eps, ("latent",), self.has_zero_centered_norms, name="norm")
        return (norm(seen_BLNW) + own_BLNW) * 2.0**-0.5

    def _by_layer(self, x_BLX: jax.Array) -> jax.Array:
        return x_BLX.reshape(*x_BLX.shape[:2], self.num_layers, self.config.width)


class PerLayerUpdate(nn.Module):
    """What a layer adds of its vector, before the norm, [B, L, D]."""

    config: PerLayerEmbeddingConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, given_BLW: jax.Array) -> jax.Array:
        d_model, width = x_BLD.shape[-1], self.config.width
        gate_shape, shape = (d_model, width), (width, d_model)
        w_gate_DW = weight(
            self, "gate", gate_shape, ("embed", "mlp"), d_model**-0.5, MatrixDims(1, 1)
        )
        w_WD = weight(self, "projection", shape, ("mlp", "embed"), width**-0.5, MatrixDims(1, 1))
        gate_BLW = project("BLD,DW->BLW", x_BLD, w_gate_DW)
        h_BLW = gated(gate_BLW, given_BLW, self.config.activation)
        return project("BLW,WD->BLD", h_BLW, w_WD)


def split_by_layer(
    given_BLNW: jax.Array, num_prefix: int, num_periods: int
) -> tuple[list[jax.Array], jax.Array]:
    """The vectors of each layer of the prefix, [B, L, W], and those of the pattern's layers by
    period, [periods, B, L, pattern, W]."""
    batch, length, _, width = given_BLNW.shape
    rest = given_BLNW[:, :, num_prefix:].reshape(batch, length, num_periods, -1, width)
    return [given_BLNW[:, :, i] for i in range(num_prefix)], jnp.moveaxis(rest, 2, 0)
