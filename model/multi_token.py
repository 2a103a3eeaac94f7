"""Predicting further than the next token (DeepSeek-V3, 2024, section 2.2): a chain of modules.

Module k (from 1) turns the states h of the module before it, or of the model, into states that
predict the token k + 1 places ahead, with the model's own output layer:

    h'_t = Block(W_p [RMSNorm(h_t); RMSNorm(Emb(y_{t+k}))]),    then the module's own norm

Embedding and output layer are shared with the model. h is taken after the norm that the output
layer reads: so public inference engines feed DeepSeek-V3's module (vLLM's deepseek_v2.py returns
the normed states, deepseek_mtp.py takes them). They multiply [Emb; h] by W_p, which is the same
matrix with its halves swapped. Place t sees tokens up to t + k and none after it.

B batch, L length, D d_model, C both inputs side by side (2 D).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.quantize import MatrixDims
from model.layers import RMSNorm, project, weight
from model.model_state import BlockState
from model.step import Step
from parallel.sharding import constrain


class MultiTokenModule(nn.Module):
    """One module of the chain."""

    layer: nn.Module
    """A Block of model/transformer.py."""
    norm_eps: float
    has_zero_centered_norms: bool = False

    @nn.compact
    def __call__(
        self,
        hidden_BLD: jax.Array,
        next_BLD: jax.Array,
        step: Step,
        state: BlockState | None = None,
    ) -> tuple[jax.Array, BlockState | None]:
        """
        Args:
          next_BLD: the embedding of the token k places ahead.
          state: what the layer keeps of places before; None: it sees those of the step alone.
        Returns:
          What the output layer and the next module read, [B, L, D], and the state.
        """
        d_model = hidden_BLD.shape[-1]
        shape = (2 * d_model, d_model)
        axes = ("latent", "embed")
        w_CD = weight(self, "projection", shape, axes, shape[0] ** -0.5, MatrixDims(1, 1))
        hidden_BLD = self._norm("hidden_norm")(hidden_BLD)
        next_BLD = self._norm("token_norm")(next_BLD)
        both_BLC = jnp.concatenate([hidden_BLD, next_BLD], axis=-1)
        x_BLD = project("BLC,CD->BLD", both_BLC, w_CD)
        x_BLD = constrain(x_BLD, "batch", "length", None)
        x_BLD, state, _ = self.layer(x_BLD, step, state)
        return self._norm("norm")(x_BLD), state

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.norm_eps, is_zero_centered=self.has_zero_centered_norms, name=name)


def ahead(x_BL: jax.Array, places: int) -> jax.Array:
    """x of the place that many to the right, [B, L, ...]; zeros where the row has ended."""
    widths = ((0, 0), (0, places), *[(0, 0)] * (x_BL.ndim - 2))
    return jnp.pad(x_BL[:, places:], widths)
