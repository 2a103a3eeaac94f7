"""Warm-up of reserved twins of grown experts (methods in the line of expert upcycling).

Growth by "reserve" leaves each parent p with n - 1 twins whose bias keeps them from being chosen.
On the first step the load c_p of each parent and a gap B are measured: B is the 99.9th percentile
of the margin by which choices were won, so a twin B below its parent is chosen for one choice in a
thousand. From then on, over `steps` steps,

    b_twin = b_parent - B (1 - step / steps),

a straight line up to the parent's bias, and b_parent is the bias at which the family wins c_p of
the choices together: without it a pair with one bias draws up to twice its parent's load. That bias
is found as quantile balancing finds an expert's (model/balance.py), over the scores of the whole
family, twins moved down by their gap. Afterwards `balance` takes over, and looks at each expert
alone. Everything lies in the router's state, so a run resumes anywhere.

T tokens, E experts, n = factor, P = E / n parents, K choices per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from configs.feed_forward import BiasWarmupConfig, RouterConfig
from model.balance import RouterStats, updated_state
from model.router import RouterState, Routing

MARGIN_QUANTILE = 0.999


class WarmupState(struct.PyTreeNode):
    """What a router's warm-up remembers, beside its RouterState."""

    step: jax.Array
    """int32, steps done."""
    share_P: jax.Array
    """float32, each parent's share of the choices before its twins entered."""
    gap: jax.Array
    """float32, B."""


class WarmupStats(NamedTuple):
    margin: jax.Array
    """The margin of choices at MARGIN_QUANTILE."""
    family_bias_P: jax.Array
    """The parents' bias that would have given each family its share, twins below it by the gap of
    the next step."""


def initial_warmup(num_experts: int, config: BiasWarmupConfig) -> WarmupState:
    share_P = jnp.zeros(num_experts // config.factor, jnp.float32)
    return WarmupState(jnp.int32(0), share_P, jnp.float32(0.0))


def warmup_stats(
    routing: Routing,
    is_token_T: jax.Array,
    state: RouterState | None,
    warmup: WarmupState,
    config: BiasWarmupConfig,
) -> WarmupStats:
    """What the update after this batch needs from it; padding left out."""
    assert state is not None
    chosen_TK = jnp.maximum(routing.expert_ids_TK, 0)
    biased_TE = routing.scores_TE + jax.lax.stop_gradient(state.bias_E)[None]
    margin_TK = jnp.take_along_axis(biased_TE, chosen_TK, axis=1) - routing.threshold_T[:, None]
    margin_TK = jnp.where(routing.expert_ids_TK >= 0, margin_TK, jnp.nan)
    gap = _gap(warmup.gap, warmup.step + 1, config)
    below_E = jnp.repeat(_below(gap, config), routing.scores_TE.shape[1] // config.factor)
    excess_TE = routing.scores_TE - routing.threshold_T[:, None] - below_E[None]
    excess_TE = jnp.where(is_token_T[:, None], excess_TE, -jnp.inf)
    excess_NP = excess_TE.reshape(-1, warmup.share_P.shape[0])  # N: tokens times family members
    ordered_NP = -jnp.sort(-excess_NP, axis=0)
    wanted_P = jnp.round(warmup.share_P * routing.counts_E.sum().astype(jnp.float32))
    last = jnp.maximum(config.factor * is_token_T.sum() - 1, 0)
    rank_P = jnp.minimum(wanted_P.astype(jnp.int32), last)
    bias_P = -jnp.take_along_axis(ordered_NP, rank_P[None], axis=0)[0]
    return jax.lax.stop_gradient(
        WarmupStats(
            margin=jnp.nan_to_num(jnp.nanquantile(margin_TK, MARGIN_QUANTILE)),
            family_bias_P=jnp.where(jnp.isfinite(bias_P), bias_P, 0.0),
        )
    )


def updated_warmup(
    state: RouterState, warmup: WarmupState, stats: RouterStats, config: RouterConfig
) -> tuple[RouterState, WarmupState]:
    """The router after a step with these stats: warmed up, or as `balance` moves it."""
    assert config.warmup is not None
    seen: WarmupStats = stats.warmup
    is_first, step = warmup.step == 0, warmup.step + 1
    counts_E = stats.counts_E.astype(jnp.float32)
    parents = warmup.share_P.shape[0]
    share_P = counts_E[:parents] / jnp.maximum(counts_E.sum(), 1.0)
    share_P = jnp.where(is_first, share_P, warmup.share_P)
    top = jnp.where(is_first, seen.margin, warmup.gap)
    bias_P = jnp.where(is_first, state.bias_E[:parents], seen.family_bias_P)
    below = _below(_gap(top, step, config.warmup), config.warmup)
    warmed_E = (bias_P[None] - below[:, None]).reshape(-1)
    free = updated_state(state, stats, config)
    bias_E = jnp.where(step <= config.warmup.steps, warmed_E, free.bias_E)
    return free.replace(bias_E=bias_E), WarmupState(step, share_P, top)


def _gap(top: jax.Array, step: jax.Array, config: BiasWarmupConfig) -> jax.Array:
    """How far twins lie below their parents on the step after `step` steps."""
    left = 1.0 - step.astype(jnp.float32) / config.steps
    return top * jnp.maximum(left, 0.0)


def _below(gap: jax.Array, config: BiasWarmupConfig) -> jax.Array:
    """The gap of each member of a family, parent first, [n]."""
    is_twin = (jnp.arange(config.factor) > 0).astype(jnp.float32)
    return gap * is_twin
