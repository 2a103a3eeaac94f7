"""Load balance of a layer's experts: the router's statistics, the losses, the load metrics.

T tokens, E experts, K experts per token. c_i are the choices expert i received, f_i = c_i / sum(c)
its share, u_i = E f_i its load relative to the mean, P_i the mean over tokens of its score.
"""

from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from configs.feed_forward import RouterConfig
from model.router import RouterState, Routing


class RouterStats(NamedTuple):
    """What one MoE layer reports about one batch; all float32 but the counts."""

    counts_E: jax.Array
    """Choices each expert received from the whole batch, int32."""
    mean_scores_E: jax.Array
    """P_i, of scores that sum to 1."""
    z_loss: jax.Array
    """mean(logsumexp(router_logits)^2)."""
    entropy: jax.Array
    """Mean over tokens of the entropy of the scores, nats."""
    sequence_balance: jax.Array
    """Mean over rows of their own load-balance loss; 0 where the config does not ask for it."""
    quantile_bias_E: jax.Array
    """The bias that would have given each expert its share; 0 likewise."""
    null_logit: jax.Array
    """At which the batch would have had target_k experts per token; 0 likewise."""
    num_tokens: jax.Array
    overflow_rows: jax.Array
    bytes_moved: jax.Array
    warmup: Any = None
    """WarmupStats where the config asks for a warm-up (model/warmup.py)."""


def router_stats(
    router_logits_TE: jax.Array,
    routing: Routing,
    is_token_BL: jax.Array,
    config: RouterConfig,
    *,
    overflow_rows: jax.Array,
    bytes_moved: jax.Array,
) -> RouterStats:
    """Means over the tokens that are not padding; T is B * L."""
    is_token_T = is_token_BL.reshape(-1)
    weight_T = is_token_T.astype(jnp.float32)
    num_tokens = weight_T.sum()
    per_token = 1.0 / jnp.maximum(num_tokens, 1.0)
    p_TE = routing.probabilities_TE
    entropy_T = -(p_TE * jnp.log(jnp.maximum(p_TE, 1e-20))).sum(axis=-1)
    lse_T = jax.nn.logsumexp(router_logits_TE, axis=-1)
    zero = jnp.float32(0.0)
    return RouterStats(
        counts_E=routing.counts_E,
        mean_scores_E=(p_TE * weight_T[:, None]).sum(axis=0) * per_token,
        z_loss=(lse_T**2 * weight_T).sum() * per_token,
        entropy=(entropy_T * weight_T).sum() * per_token,
        sequence_balance=_sequence_balance(routing, is_token_BL)
        if config.sequence_weight
        else zero,
        quantile_bias_E=quantile_bias(routing, is_token_T)
        if config.balance == "quantile"
        else jnp.zeros_like(p_TE[0]),
        null_logit=zero if config.target_k is None else matching_null(routing, is_token_T, config),
        num_tokens=num_tokens,
        overflow_rows=overflow_rows,
        bytes_moved=bytes_moved,
    )


def _sequence_balance(routing: Routing, is_token_BL: jax.Array) -> jax.Array:
    batch, length = is_token_BL.shape
    num_experts = routing.probabilities_TE.shape[1]
    ids_BN = routing.expert_ids_TK.reshape(batch, -1)
    counts_BE = jax.vmap(lambda ids_N: jnp.bincount(ids_N + 1, length=num_experts + 1)[1:])(ids_BN)
    p_BLE = routing.probabilities_TE.reshape(batch, length, num_experts)
    p_BLE = jnp.where(is_token_BL[:, :, None], p_BLE, 0.0)
    tokens_B1 = jnp.maximum(is_token_BL.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    return jax.vmap(load_balance_loss)(counts_BE, p_BLE.sum(axis=1) / tokens_B1).mean()


def quantile_bias(routing: Routing, is_token_T: jax.Array) -> jax.Array:
    """The bias at which each expert would win its equal share of these tokens' choices, [E].

    An expert wins a token where its score exceeds the token's threshold by more than -bias. So the
    bias is minus the quantile of that excess that leaves sum(counts) / E tokens above it (quantile
    balancing, Su 2026), moved to mean 0. Thresholds move with the biases: repeated steps converge.
    """
    excess_TE = routing.scores_TE - routing.threshold_T[:, None]
    excess_TE = jnp.where(is_token_T[:, None] & jnp.isfinite(excess_TE), excess_TE, -jnp.inf)
    share = routing.counts_E.sum() // routing.counts_E.shape[0]
    bias_E = -_exceeded_by(excess_TE, share)
    bias_E = jnp.where(jnp.isfinite(bias_E), bias_E, 0.0)
    return bias_E - bias_E.mean()


def matching_null(routing: Routing, is_token_T: jax.Array, config: RouterConfig) -> jax.Array:
    """The null logit at which these tokens would have target_k experts on average, float32 []."""
    assert config.target_k is not None
    rivals_TN = jnp.where(is_token_T[:, None], routing.null_rivals_TN, -jnp.inf)
    kept = config.target_k - (config.top_k - rivals_TN.shape[1])
    wanted = jnp.round(kept * is_token_T.sum().astype(jnp.float32)).astype(jnp.int32)
    logit = _exceeded_by(rivals_TN.reshape(-1, 1), wanted)[0]
    return jnp.where(jnp.isfinite(logit), logit, 0.0)


def _exceeded_by(x_TE: jax.Array, count: jax.Array) -> jax.Array:
    """The least value that at most `count` entries of each column exceed, [E], to 2^-30 of the
    column's range; bisected, because sorting the columns costs more than the router (XLA's CPU).
    """
    is_number_TE = jnp.isfinite(x_TE)
    low_E = jnp.where(is_number_TE, x_TE, jnp.inf).min(axis=0) - 1e-6
    high_E = x_TE.max(axis=0)

    def halve(_, bounds):
        low_E, high_E = bounds
        middle_E = 0.5 * (low_E + high_E)
        is_above_E = (x_TE > middle_E[None]).sum(axis=0) > count
        return jnp.where(is_above_E, middle_E, low_E), jnp.where(is_above_E, high_E, middle_E)

    return jax.lax.fori_loop(0, 30, halve, (low_E, high_E))[1]


def updated_state(state: RouterState, stats: RouterStats, config: RouterConfig) -> RouterState:
    """The router's state after a step with these stats of the whole batch."""
    bias_E, null_logit, rate = state.bias_E, state.null_logit, config.bias_rate
    counts_E = stats.counts_E.astype(jnp.float32)
    if config.balance == "loss_free":
        bias_E += jnp.float32(rate) * jnp.sign(counts_E.mean() - counts_E)
    elif config.balance == "quantile":
        bias_E += jnp.float32(rate) * (stats.quantile_bias_E - bias_E)
    elif config.balance != "none":
        assert_never(config.balance)
    if config.target_k is not None:
        # An integral controller on the mean lags while a young router's logits grow.
        null_logit = jnp.where(stats.num_tokens > 0, stats.null_logit, null_logit)
    return RouterState(bias_E, null_logit)


def merge_stats(stats: RouterStats) -> RouterStats:
    """One report from those of several micro-batches of equal size, stacked in dim 0."""
    summed = {"counts_E", "num_tokens", "overflow_rows", "bytes_moved"}

    def merge(name: str, x: Any) -> Any:
        return jax.tree.map(lambda y: y.sum(axis=0) if name in summed else y.mean(axis=0), x)

    return RouterStats(**{name: merge(name, x) for name, x in stats._asdict().items()})


def token_expert_information(mean_scores_E: jax.Array, entropy: jax.Array) -> jax.Array:
    """I(token; expert) = H(mean of scores) - mean of H(scores), nats: 0 where the router does not
    tell tokens apart, log E where each token has one expert and all are used alike.
    """
    p_E = mean_scores_E
    return -(p_E * jnp.log(jnp.maximum(p_E, 1e-20))).sum() - entropy


def load_balance_loss(counts_E: jax.Array, mean_scores_E: jax.Array) -> jax.Array:
    """E sum_i f_i P_i (Switch Transformer, 2021, eq. 4): 1 when uniform, E when one expert takes
    all.

    The counts carry no gradient and may come from more tokens than the scores: with the global
    batch's counts, balance is asked of the batch and not of each sequence (Qiu et al. 2025).
    """
    counts_E = jax.lax.stop_gradient(counts_E.astype(jnp.float32))
    share_E = counts_E / jnp.maximum(counts_E.sum(), 1.0)
    return counts_E.shape[0] * (share_E * mean_scores_E).sum()


class LoadMetrics(NamedTuple):
    """Per-layer load metrics, float32; see reference names in docs/first_run.md."""

    load_cv: jax.Array
    """Standard deviation of u_i."""
    load_cv_floor: jax.Array
    """The load_cv that uniform random routing of as many tokens shows: sqrt((E - K) / (T K))."""
    max_violation: jax.Array
    """max u_i - 1 (MaxVio, Wang et al. 2024)."""
    dead_experts: jax.Array
    """Experts with u_i < 0.1."""
    peak_load: jax.Array
    """max c_i / T: 1 when one expert is chosen by every token."""
    mean_k: jax.Array
    """Experts per token."""


def load_metrics(counts_E: jax.Array, num_tokens: jax.Array) -> LoadMetrics:
    num_experts = counts_E.shape[0]
    counts_E, tokens = counts_E.astype(jnp.float32), jnp.maximum(num_tokens, 1.0)
    choices = jnp.maximum(counts_E.sum(), 1.0)
    relative_E = num_experts * counts_E / choices
    mean_k = choices / tokens
    return LoadMetrics(
        load_cv=relative_E.std(),
        load_cv_floor=jnp.sqrt(jnp.maximum(num_experts - mean_k, 0.0) / (tokens * mean_k)),
        max_violation=relative_E.max() - 1.0,
        dead_experts=(relative_E < 0.1).sum().astype(jnp.float32),
        peak_load=counts_E.max() / tokens,
        mean_k=mean_k,
    )
