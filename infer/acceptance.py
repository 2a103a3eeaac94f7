"""How well one model drafts for another: the share of its drafts that the other would accept.

Speculative sampling (Leviathan et al. 2023) accepts a token drawn from q with the target's p at
the rate sum min(p, q); it needs no text generated to be known, only both distributions.

S batches, B rows, L length, N places.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.layers import unembed
from model.transformer import Transformer, Variables, hidden_states, output_weights

LENGTHS = (1, 2, 4, 8)
"""Lengths of drafts that are reported."""


@dataclass(frozen=True)
class Acceptance:
    """Of drafts on a text, at temperature 1 and of greedy ones."""

    sampled: float
    """The share of drawn tokens that the target accepts, mean of sum min(p, q)."""
    greedy: float
    """The share of places where both have the same first choice."""
    tokens_per_step: dict[int, float]
    """By length of the draft: tokens that one reading by the target gives on average, its own one
    included, where the draft's tokens are drawn."""
    num_places: int


def acceptance(
    target: tuple[Transformer, Variables],
    draft: tuple[Transformer, Variables],
    batches: dict[str, np.ndarray],
    chunks: int,
) -> Acceptance:
    """The acceptance of the draft's tokens at the places of these batches that count.

    Args:
      batches: "tokens", "targets", "positions", int32 [S, B, L]; places with target -1 don't count.
      chunks: of a row, whose logits are made one after the other.
    """
    sampled, greedy = [], []
    for i in range(len(batches["tokens"])):
        rows = (batches["tokens"][i], batches["positions"][i])
        models = (target[0], draft[0])
        own, same = _at_places(models, chunks, (target[1], draft[1]), *rows)
        is_counted_BL = batches["targets"][i] >= 0
        sampled.append(np.where(is_counted_BL, own, np.nan))
        greedy.append(np.where(is_counted_BL, same, np.nan))
    sampled_NL, greedy_NL = (np.concatenate(x).astype(np.float64) for x in (sampled, greedy))
    return Acceptance(
        sampled=float(np.nanmean(sampled_NL)),
        greedy=float(np.nanmean(greedy_NL)),
        tokens_per_step={n: tokens_per_step(sampled_NL, n) for n in LENGTHS},
        num_places=int(np.isfinite(sampled_NL).sum()),
    )


def tokens_per_step(accepted_NL: np.ndarray, length: int) -> float:
    """Tokens that a draft of this length gives, with the target's own one, averaged over the places
    from which it lies in the row: 1 + a_1 + a_1 a_2 + ... of the places that follow.

    Args:
      accepted_NL: the rate at each place; NaN where none is known.
    """
    width = accepted_NL.shape[1] - length + 1
    if width < 1:
        return float("nan")
    total, all_accepted = np.ones((len(accepted_NL), width)), np.ones((len(accepted_NL), width))
    for ahead in range(length):
        all_accepted = all_accepted * accepted_NL[:, ahead : ahead + width]
        total = total + all_accepted
    return float(np.nanmean(total)) if np.isfinite(total).any() else float("nan")


@partial(jax.jit, static_argnums=(0, 1))
def _at_places(
    models: tuple[Transformer, Transformer],
    chunks: int,
    variables: tuple[Variables, Variables],
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """sum min(p, q), and whether the first choices agree, float32 [B, L] each."""
    pairs = list(zip(models, variables, strict=True))
    states = tuple(hidden_states(m, v, tokens_BL, positions_BL)[0] for m, v in pairs)
    outputs = tuple(output_weights(m, v) for m, v in pairs)

    def cut(x):
        batch, length = x.shape[:2]
        return x.reshape(batch, chunks, length // chunks, -1).swapaxes(0, 1)

    def compare(parts):
        each = [unembed(x, w_DV) for x, w_DV in zip(parts, outputs, strict=True)]
        p, q = (jax.nn.softmax(logits, axis=-1) for logits in each)
        is_same = each[0].argmax(axis=-1) == each[1].argmax(axis=-1)
        return jnp.minimum(p, q).sum(axis=-1), is_same.astype(jnp.float32)

    found = jax.lax.map(compare, jax.tree.map(cut, states))
    own, same = (x.swapaxes(0, 1).reshape(tokens_BL.shape) for x in found)
    return own, same
