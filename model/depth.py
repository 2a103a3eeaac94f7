"""Mixture-of-Depths (Raposo et al. 2024): a layer that works on some tokens, the others pass by.

    r_t = w . x_t        x'_t = x_t + sigmoid(r_t) f(x_P)_t for t in P, x_t otherwise

f is the whole update of a block, attention among P only, at the tokens' own positions. In training
P is the best `capacity` of each row: the layer costs that share, but which tokens are best depends
on later ones. A cross-entropy makes r_t > 0 tell the chosen from the rest (the paper's auxiliary
loss), and scoring and generating go by that sign alone, token by token: see
`with_threshold_selection`.

B batch, L length, C tokens chosen of a row, D d_model.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.architecture import MixtureOfDepthsConfig, ModelConfig
from configs.checks import require
from model.layers import newest, weight
from model.model_state import BlockState
from model.step import Step
from parallel.sharding import constrain

Update = Callable[[jax.Array, Step], tuple[jax.Array, BlockState | None]]
"""f: (x_BCD, step of those tokens) -> [B, C, D] and the state with the tokens; tokens at position
-1 do not exist for it."""

Routed = tuple[jax.Array, jax.Array, BlockState | None]
"""x_BLD after the layer; which tokens it worked on, bool [B, L]; the state."""


class DepthStats(NamedTuple):
    """What one depth layer reports about one batch, float32, padding left out."""

    predictor_loss: jax.Array
    """Mean cross-entropy of sigmoid(r_t) with whether t was chosen, nats."""
    predictor_accuracy: jax.Array
    """Share of the tokens for which r_t > 0 says whether t was chosen."""
    chosen_fraction: jax.Array


def with_threshold_selection(config: ModelConfig) -> ModelConfig:
    """The model as it scores and generates: each depth layer chooses by r_t > 0.

    The same variables fit; a model without depth layers is returned as it is.
    """

    def by_threshold(depth: MixtureOfDepthsConfig | None) -> MixtureOfDepthsConfig | None:
        return depth and dataclasses.replace(depth, selection="threshold")

    pattern = tuple(
        dataclasses.replace(spec, depth=by_threshold(spec.depth)) for spec in config.pattern
    )
    return dataclasses.replace(config, pattern=pattern)


def routed(
    block: Any,
    depth: MixtureOfDepthsConfig,
    x_BLD: jax.Array,
    step: Step,
    state: BlockState | None,
    preference_BE: jax.Array | None,
) -> tuple[jax.Array, BlockState | None]:
    """The block (model/block.py: Block) of the tokens that its router chooses.

    One token per row, with a state: where no row's is chosen, the block is really skipped.

    Raises:
      UserError: top_capacity with a state.
    """
    require(
        state is None or depth.selection == "threshold",
        "depth.selection='top_capacity' looks ahead and can't read piece by piece: use the config "
        "that model.depth.with_threshold_selection gives",
    )
    width = x_BLD.shape[-1]
    w_D = weight(block, "depth_router", (width,), ("embed",), width**-0.5)
    r_BL = router_logits(w_D, x_BLD)
    if state is not None and x_BLD.shape[1] == 1:

        def run(block, x_B1D, state):
            update = _update_of(block, state, preference_BE)
            x_B1D, _, state = update_positive(update, x_B1D, r_BL, step)
            return x_B1D, state

        def skip(_, x_B1D, state):
            return x_B1D, state

        any_chosen = chosen_by_sign(r_BL, step.positions_BL).any()
        return nn.cond(any_chosen, run, skip, block, x_BLD, state)
    update = _update_of(block, state, preference_BE)
    if depth.selection == "top_capacity":
        x_BLD, is_chosen_BL, state = update_best(update, x_BLD, r_BL, step, depth.capacity)
    elif depth.selection == "threshold":
        x_BLD, is_chosen_BL, state = update_positive(update, x_BLD, r_BL, step)
    else:
        assert_never(depth.selection)
    stats = depth_stats(r_BL, is_chosen_BL, step.positions_BL >= 0)
    block.sow("router", "depth", stats, init_fn=lambda: None, reduce_fn=newest)
    return constrain(x_BLD, "batch", "length", None), state


def _update_of(block: Any, state: BlockState | None, preference_BE: jax.Array | None) -> Update:
    def update(x_BCD, step):
        _, first_BCD, second_BCD, new, _ = block.branches(x_BCD, step, state, preference_BE)
        return first_BCD + second_BCD, new

    return update


def num_chosen(capacity: float, length: int) -> int:
    """C = ceil(capacity * L)."""
    return math.ceil(capacity * length - 1e-9)  # 0.07 * 100 is a little more than 7


def router_logits(w_D: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """r_t = w . x_t, float32 [B, L]."""
    return jnp.einsum("BLD,D->BL", x_BLD.astype(jnp.float32), w_D)


def update_best(
    update: Update,
    x_BLD: jax.Array,
    r_BL: jax.Array,
    step: Step,
    capacity: float,
) -> Routed:
    """x with the update of each row's best C tokens.

    The chosen are gathered in the row's order, so documents stay contiguous. Padding comes after
    every token; where a row has fewer than C tokens, some is gathered and adds nothing.
    """
    is_token_BL = step.positions_BL >= 0
    count = num_chosen(capacity, x_BLD.shape[1])
    _, best_BC = jax.lax.top_k(jnp.where(is_token_BL, r_BL, -jnp.inf), count)
    rows_BC = jnp.sort(best_BC, axis=1)

    def gather(array_BL):
        return jnp.take_along_axis(array_BL, rows_BC, axis=1)

    x_BCD = jnp.take_along_axis(x_BLD, rows_BC[:, :, None], axis=1)
    f_BCD, state = update(x_BCD, step.gather(rows_BC))
    gate_BC = jnp.where(gather(is_token_BL), jax.nn.sigmoid(gather(r_BL)), 0.0)
    batch_B1 = jnp.arange(x_BLD.shape[0])[:, None]
    x_BLD = x_BLD.at[batch_B1, rows_BC].add(gate_BC[:, :, None].astype(x_BLD.dtype) * f_BCD)
    is_chosen_BL = jnp.zeros(r_BL.shape, jnp.bool_).at[batch_B1, rows_BC].set(True)
    return x_BLD, is_chosen_BL & is_token_BL, state


def update_positive(
    update: Update,
    x_BLD: jax.Array,
    r_BL: jax.Array,
    step: Step,
) -> Routed:
    """x with the update of each token with r_t > 0.

    All tokens pass through f, those not chosen as padding.
    """
    is_chosen_BL = chosen_by_sign(r_BL, step.positions_BL)
    positions_BL = jnp.where(is_chosen_BL, step.positions_BL, -1)
    f_BLD, state = update(x_BLD, step.replace(positions_BL=positions_BL))
    gate_BL1 = jnp.where(is_chosen_BL, jax.nn.sigmoid(r_BL), 0.0)[:, :, None]
    return x_BLD + gate_BL1.astype(x_BLD.dtype) * f_BLD, is_chosen_BL, state


def chosen_by_sign(r_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """The causal rule, bool [B, L]: sigmoid(r_t) > 0.5, never for padding."""
    return (r_BL > 0) & (positions_BL >= 0)


def depth_stats(r_BL: jax.Array, is_chosen_BL: jax.Array, is_token_BL: jax.Array) -> DepthStats:
    """Means over the tokens that are not padding; the choice is a constant."""
    weight_BL = is_token_BL.astype(jnp.float32)
    weight_BL /= jnp.maximum(weight_BL.sum(), 1.0)
    chosen_BL = is_chosen_BL.astype(jnp.float32)
    return DepthStats(
        predictor_loss=((jax.nn.softplus(r_BL) - chosen_BL * r_BL) * weight_BL).sum(),
        predictor_accuracy=jnp.where((r_BL > 0) == is_chosen_BL, weight_BL, 0.0).sum(),
        chosen_fraction=(chosen_BL * weight_BL).sum(),
    )
