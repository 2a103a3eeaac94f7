"""Self-speculative decoding (LayerSkip, Elhoushi et al. 2024): the first layers draft, all verify.

An exit's layers write a few tokens one at a time; the layers after it then read them all at once,
and what the whole model would have said in their place is kept as far as the drafts agree, and one
token further. So the text is the whole model's greedy text, and easy tokens cost little more than
the layers that drafted them. The exit should be trained (model/early_exit.py).

B rows, N drafted tokens, D d_model.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from configs.attention import LocalSparseAttentionConfig
from configs.checks import require, require_positive
from infer.layerwise import exit_logits, layers_by_exit, run_layers, stacked
from model.cache import BlockCache, Cache, rewind
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
    cache: Cache
    """With tokens that may not hold: `draft_and_verify` takes them back when it goes on."""


def check_draft(model: Transformer, draft: Draft) -> None:
    """
    Raises:
      UserError: no such exit before the model's end, or a cache from which nothing can be taken.
    """
    config = model.config
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
    for spec in (*config.prefix, *config.pattern):
        require(
            not isinstance(spec.attention, LocalSparseAttentionConfig),
            "drafts can't be taken back from attention.kind='local_sparse', whose cache has no "
            "spare slots: generate without a draft",
        )
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
    cache: Cache,
    draft: Draft,
) -> Verified:
    """Reads each row's next token and the drafts that follow it.

    Args:
      cache: with `spare` of draft.length; tokens from position_B on are taken back first.
    """
    check_draft(model, draft)
    cache, w_DV = rewind(cache, position_B), output_weights(model, variables)
    groups = layers_by_exit(model, variables, cache.periods)
    first = [layer for group in groups[: draft.exit] for layer in group]
    rest = [layer for group in groups[draft.exit :] for layer in group]
    prefix, caches = cache.prefix, [cast(BlockCache, layer.cache) for layer in first]
    token_B1, states, drafted = token_B[:, None], [], []
    for j in range(draft.length):
        positions_B1 = position_B[:, None] + j
        begun: Any = model.apply(
            variables, token_B1, positions_B1, Cache(prefix, cache.periods), method="begin"
        )
        x_B1D, segments_B1, prefix = begun
        x_B1D, caches = run_layers(model, first, caches, x_B1D, positions_B1, segments_B1)
        token_B1 = jnp.argmax(exit_logits(model, variables, x_B1D, w_DV), axis=-1)
        states.append(x_B1D)
        drafted.append(token_B1)
    x_BND, drafted_BN = jnp.concatenate(states, axis=1), jnp.concatenate(drafted, axis=1)
    positions_BN = position_B[:, None] + jnp.arange(draft.length)
    x_BND, later = run_layers(
        model,
        rest,
        [layer.cache for layer in rest],
        x_BND,
        positions_BN,
        jnp.zeros_like(positions_BN),
    )
    tokens_BN = jnp.argmax(exit_logits(model, variables, x_BND, w_DV), axis=-1).astype(jnp.int32)
    is_agreed_BN = jnp.cumprod(drafted_BN == tokens_BN, axis=1)
    count_B = jnp.minimum(is_agreed_BN.sum(axis=1) + 1, draft.length).astype(jnp.int32)
    periods = stacked([*caches, *later], len(model.config.pattern))
    return Verified(tokens_BN, count_B, Cache(prefix, periods))
