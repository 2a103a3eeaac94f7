"""Early exit in training (LayerSkip, Elhoushi et al. 2024): which periods rows skip, which exits a
step supervises and how much each counts.

Exits lie after each period of the pattern, and a period stands for its last layer: with a pattern
of one layer these are the published formulas. Layers l = 0 ... L-1, e_s = loss_scale:

    p(l) = p_max (exp(l ln 2 / (L-1)) - 1)
    e(l) = e_s sum_{i<=l} i  for l < L-1        e(L-1) = L-1 + e_s sum_{i<=L-2} i

or, weighting "uniform", e(l) = e_s and e(L-1) = 1.

The rates are the same in every step (LayerSkip's S(t) = 1, as for continued training). A skipped
period is computed and thrown away for that row: shapes are static. Inference lies in
infer/early_exit.py. P periods, K exits supervised in a step.
"""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import EarlyExitConfig, ModelConfig


class Supervised(NamedTuple):
    """The exits that one step supervises beside the last layer."""

    periods_K: jax.Array
    """int32, the period before the exit; -1 where the turn has fewer than K exits."""
    weights_K: jax.Array
    """float32, 0 where there is no exit; with last_weight they sum to 1."""
    last_weight: jax.Array


def exit_layers(config: ModelConfig) -> np.ndarray:
    """Index of the layer before each exit, int [num_exits]; the last is num_layers - 1."""
    spacing, first = config.exit_spacing or len(config.pattern), len(config.prefix)
    return first + spacing * np.arange(1, config.num_exits + 1) - 1


def dropout_rates(config: ModelConfig) -> np.ndarray:
    """p(l) of each period, float32 [P]."""
    layer_P = exit_layers(config)
    rate_P = np.exp(layer_P * np.log(2.0) / (config.num_layers - 1)) - 1
    return (_exits(config).dropout * rate_P).astype(np.float32)


def exit_weights(config: ModelConfig) -> np.ndarray:
    """e(l) of each exit, the last layer among them, float32 [P]; not normalised."""
    exits = _exits(config)
    layer_P, scale = exit_layers(config), exits.loss_scale
    if exits.weighting == "uniform":
        return np.array([*[scale] * (len(layer_P) - 1), 1.0], np.float32)
    if exits.weighting == "quadratic":
        e_P = scale * layer_P * (layer_P + 1) / 2
        last = config.num_layers - 1
        e_P[-1] = last + scale * (last - 1) * last / 2
        return e_P.astype(np.float32)
    assert_never(exits.weighting)


def supervised_exits(config: ModelConfig, step: jax.Array) -> Supervised:
    """Step s supervises the exits p with p = s mod R, and the last layer; K = ceil((P-1) / R)."""
    early, turns = config.num_periods - 1, _exits(config).rotation
    count = -(-early // turns)
    periods_K = (step % turns + turns * jnp.arange(count)).astype(jnp.int32)
    is_exit_K = periods_K < early
    e_P = jnp.asarray(exit_weights(config))
    e_K = jnp.where(is_exit_K, e_P[jnp.minimum(periods_K, early - 1)], 0.0)
    total = e_K.sum() + e_P[-1]
    return Supervised(jnp.where(is_exit_K, periods_K, -1), e_K / total, e_P[-1] / total)


def _exits(config: ModelConfig) -> EarlyExitConfig:
    assert config.early_exit is not None
    return config.early_exit
