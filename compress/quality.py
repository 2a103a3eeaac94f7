"""What a smaller model loses against the one it was made of, on the same text.

B batch, L length, D d_model, V vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibration import targets_of
from compress.layered import LayeredModel, Tree, embed, ends_model, run_layer
from model.layers import unembed
from model.step import Step
from model.transformer import Transformer


@dataclass(frozen=True)
class Quality:
    """On held-out text; nats are per token."""

    tokens: int
    before: float
    """The original's cross-entropy, nats."""
    after: float
    divergence: float
    """KL(original || smaller) of next tokens, nats."""
    agreement: float
    """Share of places where both hold the same next token most likely."""

    @property
    def lost(self) -> float:
        """Nats by which the cross-entropy rose."""
        return self.after - self.before

    def __str__(self) -> str:
        return (
            f"loss {self.before:.4f} -> {self.after:.4f} nats ({self.lost:+.4f}), KL "
            f"{self.divergence:.4f}, same top token {self.agreement:.1%} ({self.tokens:,} tokens)"
        )


def hidden_of(model: LayeredModel, steps: Sequence[Step]) -> list[jax.Array]:
    """What the last layer gives for each batch, [B, L, D]."""
    ends = ends_model(model)
    xs = [embed(ends, model.ends, step.tokens_BL) for step in steps]
    for layer in model.layers:
        xs = [
            run_layer(model, layer, x_BLD, step)[0] for x_BLD, step in zip(xs, steps, strict=True)
        ]
    return xs


def compare(
    before: LayeredModel,
    after: LayeredModel,
    steps: Sequence[Step],
    hidden_before: Sequence[jax.Array] | None = None,
) -> Quality:
    """Both models on the same rows.

    Args:
      hidden_before: `hidden_of` the first, where it is known.
    """
    first = hidden_before or hidden_of(before, steps)
    second = hidden_of(after, steps)
    ends = ends_model(before), ends_model(after)
    total, count = np.zeros(4), 0
    for step, x_BLD, y_BLD in zip(steps, first, second, strict=True):
        targets_BL = targets_of(step)
        total += np.asarray(
            _sums(ends, (before.ends, after.ends), (x_BLD, y_BLD), jnp.asarray(targets_BL))
        )
        count += int((targets_BL >= 0).sum())
    mean = total / max(count, 1)
    return Quality(count, float(mean[0]), float(mean[1]), max(float(mean[2]), 0.0), float(mean[3]))


@partial(jax.jit, static_argnums=0)
def _sums(
    ends: tuple[Transformer, Transformer],
    params: tuple[Tree, Tree],
    hidden: tuple[jax.Array, jax.Array],
    targets_BL: jax.Array,
) -> jax.Array:
    """Sums of nats, nats, KL and agreement over the places that have a target, [4]."""
    weights: list[Any] = []
    read: list[Any] = []
    for model, own, x_BLD in zip(ends, params, hidden, strict=True):
        variables = {"params": own}
        read.append(model.apply(variables, x_BLD, method="finish"))
        weights.append(model.apply(variables, method="unembedding"))

    def row(at: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_LD, y_LD, targets_L = at
        p_LV, q_LV = (
            jax.nn.log_softmax(unembed(h_LD, w))
            for h_LD, w in zip((x_LD, y_LD), weights, strict=True)
        )
        is_target_L = targets_L >= 0
        picked = jnp.maximum(targets_L, 0)[:, None]
        nats = [-jnp.take_along_axis(logp_LV, picked, axis=1)[:, 0] for logp_LV in (p_LV, q_LV)]
        divergence_L = (jnp.exp(p_LV) * (p_LV - q_LV)).sum(-1)
        same_L = (p_LV.argmax(-1) == q_LV.argmax(-1)).astype(jnp.float32)
        return jnp.stack(
            [jnp.where(is_target_L, x_L, 0).sum() for x_L in (*nats, divergence_L, same_L)]
        )

    return jax.lax.map(row, (*read, targets_BL)).sum(0)
