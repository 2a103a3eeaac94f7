"""The router: the experts that a token goes to, and their weights.

T tokens, E experts, N null experts, K choices per token, J groups of experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from configs.feed_forward import GROUP_MEMBERS, RouterConfig
from model.router_scores import SCORES
from model.step import OWN_CHOICE


class RouterState(struct.PyTreeNode):
    """What a router learns without gradients: the collection router_state of a checkpoint."""

    bias_E: jax.Array
    """float32, added to the scores for the choice of experts; gates don't see it."""
    null_logit: jax.Array
    """float32 [], the logit of each null expert."""


class Routing(NamedTuple):
    expert_ids_TK: jax.Array
    """int32; -1 means no work at all."""
    gates_TK: jax.Array
    """float32, 0 where the id is -1."""
    counts_E: jax.Array
    """Choices each expert received, int32."""
    probabilities_TE: jax.Array
    """float32, the scores scaled to sum to 1: what losses and metrics judge."""
    scores_TE: jax.Array
    """float32, as the choice saw them, without bias."""
    threshold_T: jax.Array
    """float32, the best biased score that was not chosen; -inf where everything was."""
    null_rivals_TN: jax.Array
    """float32, the null logits above which a token loses one more of its experts, for each it may
    lose; [T, 0] without null experts. What the rest of the program does not read costs nothing."""


TOKEN_EXPERTS = "token_experts"
"""The table of a router that goes by token, int32 [V, K], in the collection router_state."""


def token_experts(vocab_size: int, num_experts: int, top_k: int) -> jax.Array:
    """The table that such a router begins with, int32 [V, K]: for each token K different experts,
    drawn by hashing its id (Knuth's multiplicative hash)."""
    hash_V = jnp.arange(vocab_size, dtype=jnp.uint32) * jnp.uint32(2_654_435_761)
    first_V = (hash_V >> 16) % num_experts
    stride_V = 1 + (hash_V >> 7) % max(num_experts // top_k, 1)  # K strides stay below E
    ids_VK = first_V[:, None] + stride_V[:, None] * jnp.arange(top_k, dtype=jnp.uint32)[None]
    return (ids_VK % num_experts).astype(jnp.int32)


def initial_state(num_experts: int) -> RouterState:
    return RouterState(jnp.zeros(num_experts, jnp.float32), jnp.zeros((), jnp.float32))


def needs_state(config: RouterConfig) -> bool:
    """Whether anything in a RouterState is ever other than zero."""
    return config.balance != "none" or config.num_null_experts > 0


def route(
    router_logits_TE: jax.Array,
    config: RouterConfig,
    state: RouterState | None = None,
    *,
    is_token_T: jax.Array | None = None,
    preference_E: jax.Array | None = None,
) -> Routing:
    """Returns each token's experts, best first, and their gates.

    The choice is by score plus state.bias plus preference; gates are the scores alone of what was
    chosen (DeepSeek-V3, 2024, section 2.1.2), scaled to sum to 1 where config.normalize_gates
    (Mixtral; without it OLMoE), times gate_scale. Null experts take part in the choice with
    state.null_logit, each at most once; what falls on them is id -1, and the gates of the others
    sum to 1. Ties go to the lower id, real experts before null ones.

    Args:
      router_logits_TE: float32 [T, E].
      state: needed where `needs_state`; its bias has no gradient.
      is_token_T: bool [T]; False marks padding, which goes nowhere.
      preference_E: float32 [E] or [T, E], a bias the caller adds to the choice.
    Raises:
      ValueError: logits that are not float32, fewer experts than top_k, or no state where needed.
    """
    num_experts = router_logits_TE.shape[1]
    if router_logits_TE.dtype != jnp.float32:
        raise ValueError(f"router_logits must be float32, got {router_logits_TE.dtype}")
    if config.top_k > num_experts + config.num_null_experts:
        raise ValueError(f"top_k={config.top_k} must not exceed the {num_experts} experts")
    if state is None and needs_state(config):
        raise ValueError("this router needs its state: pass the collection router_state")
    logits, biases = router_logits_TE, []
    if state is not None:
        nulls = jnp.broadcast_to(state.null_logit, (logits.shape[0], config.num_null_experts))
        logits = jnp.concatenate([logits, nulls], axis=1)
        biases.append(jax.lax.stop_gradient(state.bias_E))
    scores = SCORES[config.scores].forward(logits)
    scores_TE = scores[:, :num_experts]
    if preference_E is not None:
        biases.append(preference_E)
    choice_TE = sum((jnp.broadcast_to(b, scores_TE.shape) for b in biases), scores_TE)
    if config.num_groups is not None and config.top_groups is not None:
        choice_TE = _keep_best_groups(choice_TE, config.num_groups, config.top_groups, config)
    choice = jnp.concatenate([choice_TE, scores[:, num_experts:]], axis=1)
    ids_TK, threshold_T = _choose(choice, config.top_k)

    is_real_TK = ids_TK < num_experts
    if is_token_T is not None:
        is_real_TK &= is_token_T[:, None]
    ids_TK = jnp.where(is_real_TK, ids_TK, -1)
    return Routing(
        expert_ids_TK=ids_TK,
        gates_TK=_gates(scores_TE, ids_TK, config),
        counts_E=jnp.bincount(ids_TK.reshape(-1) + 1, length=num_experts + 1)[1:].astype(jnp.int32),
        probabilities_TE=_probabilities(router_logits_TE, scores_TE, config),
        scores_TE=scores_TE,
        threshold_T=threshold_T,
        null_rivals_TN=_null_rivals(choice, num_experts, config, state),
    )


def with_chosen(routing: Routing, chosen_TK: jax.Array, config: RouterConfig) -> Routing:
    """The routing with each token's experts as given, and the gates that its own scores give them.

    Args:
      chosen_TK: int32; OWN_CHOICE (model/step.py) keeps what the router chose.
    """
    ids_TK = jnp.where(chosen_TK == OWN_CHOICE, routing.expert_ids_TK, chosen_TK)
    num_experts = routing.counts_E.shape[0]
    counts_E = jnp.bincount(ids_TK.reshape(-1) + 1, length=num_experts + 1)[1:]
    return routing._replace(
        expert_ids_TK=ids_TK,
        gates_TK=_gates(routing.scores_TE, ids_TK, config),
        counts_E=counts_E.astype(jnp.int32),
    )


def changed_share(own_BLK: jax.Array, chosen_BLK: jax.Array) -> jax.Array:
    """The share of the given experts that are not among a token's own, float32 []; 0 of none."""
    is_given_BLK = chosen_BLK >= 0
    is_same_BLK = (chosen_BLK[..., :, None] == own_BLK[..., None, :]).any(axis=-1)
    changed = (is_given_BLK & ~is_same_BLK).sum(dtype=jnp.float32)
    return changed / jnp.maximum(is_given_BLK.sum(dtype=jnp.float32), 1.0)


def score_deviation(router_logits_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Standard deviation of each token's scores over the experts, [T, 1]: a preference's unit."""
    scores_TE = SCORES[config.scores].forward(router_logits_TE)
    return jax.lax.stop_gradient(scores_TE.std(axis=-1, keepdims=True))


def _gates(scores_TE: jax.Array, ids_TK: jax.Array, config: RouterConfig) -> jax.Array:
    gates_TK = jnp.take_along_axis(scores_TE, jnp.maximum(ids_TK, 0), axis=1)
    gates_TK = jnp.where(ids_TK >= 0, gates_TK, 0.0)
    if config.normalize_gates:
        gates_TK /= jnp.maximum(gates_TK.sum(axis=-1, keepdims=True), 1e-20)
    return config.gate_scale * gates_TK


def _probabilities(logits_TE: jax.Array, scores_TE: jax.Array, config: RouterConfig) -> jax.Array:
    kind = SCORES[config.scores]
    if kind.is_shared:
        return kind.forward(logits_TE) if config.num_null_experts else scores_TE
    return scores_TE / jnp.maximum(scores_TE.sum(axis=-1, keepdims=True), 1e-20)


def _null_rivals(
    choice: jax.Array, num_experts: int, config: RouterConfig, state: RouterState | None
) -> jax.Array:
    """The logits at which a null expert would draw with each expert that it may displace, [T, N].

    Exact but for shared scores with biases, which all move with the null's; then a first step.
    """
    nulls, top_k = min(config.num_null_experts, config.top_k), config.top_k
    if nulls == 0 or state is None:
        return choice[:, :0]
    best_TK, _ = jax.lax.top_k(choice[:, :num_experts], top_k)
    score_TN = jnp.maximum(best_TK[:, top_k - nulls :], 1e-20)
    return SCORES[config.scores].inverse(score_TN, choice[:, -1:], state.null_logit)


def _keep_best_groups(
    choice_TE: jax.Array, num_groups: int, top_groups: int, config: RouterConfig
) -> jax.Array:
    """-inf outside each token's best groups; a group's score is the sum of its best two, or its
    best one.
    """
    tokens, num_experts = choice_TE.shape
    choice_TJE = choice_TE.reshape(tokens, num_groups, num_experts // num_groups)
    judged = GROUP_MEMBERS[config.group_score]
    group_TJ = jax.lax.top_k(choice_TJE, judged)[0].sum(axis=-1)
    _, best_TG = jax.lax.top_k(group_TJ, top_groups)
    is_best_TJ = jax.nn.one_hot(best_TG, num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(is_best_TJ[:, :, None], choice_TJE, -jnp.inf).reshape(tokens, num_experts)


def _choose(choice: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The ids of the best top_k of each row, and the value of the next one."""
    values, ids = jax.lax.top_k(choice, min(top_k + 1, choice.shape[1]))
    if values.shape[1] == top_k:
        return ids, jnp.full(ids.shape[:1], -jnp.inf)
    return ids[:, :top_k], values[:, top_k]
