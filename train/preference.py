"""Learning from preferences: direct preference optimisation (DPO; Rafailov et al. 2023, eq. 7).

Of a chosen and a rejected answer y to the same prompt x the implicit reward is

    r(y) = beta * (log p(y | x) - log p_reference(y | x)),

log p summed over the answer's tokens, and the loss is -log sigmoid(r(chosen) - r(rejected)),
averaged over pairs. The reference is the model that the run began with: with adapters, the model
without them.

B rows, those of a pair side by side, the chosen one first; P pairs; L length, N chunks of c tokens,
D d_model, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp

from configs.tuning import PreferenceConfig
from model.transformer import Transformer, Variables, hidden_states, output_weights
from train.losses import cut_in_chunks, logits_of, token_nats

Sums = dict[str, jax.Array]


def preference_loss(
    log_probs_B: jax.Array, reference_B: jax.Array, config: PreferenceConfig
) -> tuple[jax.Array, Sums]:
    """The loss summed over pairs; and sums of how often the chosen answer has the higher reward
    ("accuracy"), of the rewards' difference ("margin") and of both rewards.

    Args:
      log_probs_B: log p of each row's answer, float32; reference_B: the same of the reference.
    """
    rewards_P2 = config.beta * (log_probs_B - reference_B).reshape(-1, 2)
    chosen_P, rejected_P = rewards_P2[:, 0], rewards_P2[:, 1]
    margin_P = chosen_P - rejected_P
    loss = jax.nn.softplus(-margin_P).sum()
    sums = {
        "accuracy": (margin_P > 0).sum(dtype=jnp.float32),
        "margin": margin_P.sum(),
        "chosen_reward": chosen_P.sum(),
        "rejected_reward": rejected_P.sum(),
    }
    return loss, sums


def row_log_probs(
    hidden_BLD: jax.Array, w_DV: jax.Array, targets_BL: jax.Array, num_chunks: int
) -> jax.Array:
    """log p of each row's targets, summed over those that are not negative; float32 [B].

    Logits exist a chunk at a time, and are made again for the gradient.
    """

    @jax.checkpoint
    def chunk_log_probs(hidden_BcD: jax.Array, targets_Bc: jax.Array) -> jax.Array:
        nats_Bc = token_nats(logits_of(hidden_BcD, w_DV), targets_Bc)
        return -jnp.where(targets_Bc >= 0, nats_Bc, 0.0).sum(axis=1)

    def add(total_B: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return total_B + chunk_log_probs(*chunk), None

    zeros_B = jnp.zeros(hidden_BLD.shape[0], jnp.float32)
    chunks = cut_in_chunks((hidden_BLD, targets_BL), num_chunks)
    return jax.lax.scan(add, zeros_B, chunks)[0]


def log_probs(model: Transformer, variables: Variables, batch: dict[str, jax.Array]) -> jax.Array:
    """log p of each row's answer by a model, float32 [B]; no gradient leaves it."""
    hidden_BLD, _ = hidden_states(model, variables, batch["tokens"], batch["positions"])
    w_DV, chunks = output_weights(model, variables), model.execution.logits_chunks
    found_B = row_log_probs(hidden_BLD, w_DV, batch["targets"], chunks)
    return jax.lax.stop_gradient(found_B)


def num_pairs(targets_BL: jax.Array) -> jax.Array:
    """Pairs of rows in which anything counts, float32, at least 1."""
    has_targets_B = (targets_BL >= 0).any(axis=1)
    return jnp.maximum(has_targets_B.sum(), 2).astype(jnp.float32) / 2
