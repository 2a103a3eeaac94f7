"""Self-speculative decoding (LayerSkip, Elhoushi et al. 2024): the first layers draft, all verify.

An exit's layers write a few tokens one at a time; the layers after it then read them all at once,
and what the whole model would have said in their place is kept as far as the drafts agree, and one
token further. So the text is the whole model's greedy text, and easy tokens cost little more than
the layers that drafted them. The exit should be trained (model/early_exit.py).

B rows, N drafted tokens, D d_model.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.checks import require, require_positive
from infer.early_exit import begin, exit_logits, exit_ranges, run_layers, unexitable_reason
from model.model_state import ModelState, rewind, unrewindable_reason
from model.step import make_step
from model.transformer import Transformer, Variables, output_weights


@dataclass(frozen=True)
class Draft:
    """Who drafts, and how much."""

    exit: int = 1
    """The exit whose layers draft; 1 is the first."""
    length: int = 4
    """Tokens drafted before the layers after the exit read them."""

    def __post_init__(self) -> None:
        require_positive(self, "exit", "length")


class Verified(NamedTuple):
    tokens_BN: jax.Array
    """What the whole model says after each token read, int32; the first count_B of them hold."""
    count_B: jax.Array
    """int32, 1 to N."""
    state: ModelState
    """With tokens that may not hold: `draft_and_verify` takes them back when it goes on."""


def check_draft(model: Transformer, draft: Draft) -> None:
    """
    Raises:
      UserError: no such exit before the model's end, or a cache from which nothing can be taken.
    """
    config = model.config
    reason = unexitable_reason(config)
    require(reason is None, f"{reason}")
    require(
        draft.exit < config.num_exits,
        f"draft.exit={draft.exit} is no exit before the model's end: it has "
        f"{config.num_exits - 1} of them, see model.exit_spacing",
    )
    require(
        draft.length < config.context_length,
        f"draft.length={draft.length} must be below the model's "
        f"context_length={config.context_length}: draft fewer tokens at a time",
    )
    reason = unrewindable_reason(config)
    require(reason is None, f"drafts can't be taken back ({reason}): generate without a draft")
    for spec in (*config.prefix, *config.pattern):
        require(
            spec.depth is None or spec.depth.selection == "threshold",
            "drafting needs depth.selection='threshold': use the config that "
            "model.depth.with_threshold_selection gives",
        )


def draft_and_verify(
    model: Transformer,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    state: ModelState,
    draft: Draft,
) -> Verified:
    """Reads each row's next token and the drafts that follow it.

    Args:
      model: whose layers lie apart (model/unstacked.py).
      position_B: of token_B; -1 for a row that does nothing.
      state: with `spare` of draft.length; tokens from position_B on are taken back first.
    """
    check_draft(model, draft)
    is_live_B = position_B >= 0
    length_B = jnp.where(is_live_B, position_B, jnp.iinfo(jnp.int32).max)
    state, w_DV = rewind(state, length_B), output_weights(model, variables, as_stored=True)
    ranges = exit_ranges(model)
    split, end = ranges[draft.exit - 1][1], ranges[-1][1]
    token_B1, positions_BN = token_B[:, None], position_B[:, None] + jnp.arange(draft.length)
    positions_BN = jnp.where(is_live_B[:, None], positions_BN, -1)
    states, drafted = [], []
    for j in range(draft.length):
        step = make_step(token_B1, positions_BN[:, j : j + 1])
        x_B1D, state = begin(model, variables, step, state)
        x_B1D, state = run_layers(model, variables, x_B1D, step.replace(layers=(0, split)), state)
        token_B1 = jnp.argmax(exit_logits(model, variables, x_B1D, w_DV), axis=-1)
        states.append(x_B1D)
        drafted.append(token_B1)
    x_BND, drafted_BN = jnp.concatenate(states, axis=1), jnp.concatenate(drafted, axis=1)
    later = make_step(drafted_BN, positions_BN).replace(layers=(split, end))
    x_BND, state = run_layers(model, variables, x_BND, later, state)
    tokens_BN = jnp.argmax(exit_logits(model, variables, x_BND, w_DV), axis=-1).astype(jnp.int32)
    is_agreed_BN = jnp.cumprod(drafted_BN == tokens_BN, axis=1)
    count_B = jnp.minimum(is_agreed_BN.sum(axis=1) + 1, draft.length).astype(jnp.int32)
    return Verified(tokens_BN, count_B, state)
