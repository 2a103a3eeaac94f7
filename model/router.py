"""Which experts a token goes to, and with which weight.

T tokens, E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.base import RouterConfig


class Routing(NamedTuple):
    expert_ids_TK: jax.Array
    """int32; -1 means no work at all."""
    gates_TK: jax.Array
    """float32, 0 where the id is -1."""
    counts_E: jax.Array
    """Choices each expert received, int32."""


def route(
    router_logits_TE: jax.Array, config: RouterConfig, is_token_T: jax.Array | None = None
) -> Routing:
    """Returns each token's top_k experts by softmax score, best first, and their gates.

    Gates are the scores of the chosen experts, scaled to sum to 1 where config.normalize_gates
    (Mixtral, 2024; without it OLMoE, 2024). Ties go to the lower id.

    Args:
      router_logits_TE: float32 [T, E].
      is_token_T: bool [T]; False marks padding, which goes nowhere.
    Raises:
      ValueError: logits that are not float32, or fewer experts than top_k.
    """
    num_experts = router_logits_TE.shape[1]
    if router_logits_TE.dtype != jnp.float32:
        raise ValueError(f"router_logits must be float32, got {router_logits_TE.dtype}")
    if config.top_k > num_experts:
        raise ValueError(f"top_k={config.top_k} must not exceed the {num_experts} experts")
    scores_TE = jax.nn.softmax(router_logits_TE, axis=-1)
    gates_TK, expert_ids_TK = jax.lax.top_k(scores_TE, config.top_k)
    if config.normalize_gates:
        gates_TK = gates_TK / gates_TK.sum(axis=-1, keepdims=True)
    if is_token_T is not None:
        expert_ids_TK = jnp.where(is_token_T[:, None], expert_ids_TK, -1)
        gates_TK = jnp.where(is_token_T[:, None], gates_TK, 0.0)
    counts_E = jnp.bincount(
        jnp.where(expert_ids_TK < 0, num_experts, expert_ids_TK).reshape(-1), length=num_experts + 1
    )
    return Routing(expert_ids_TK, gates_TK, counts_E[:-1].astype(jnp.int32))
