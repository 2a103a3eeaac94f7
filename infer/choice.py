"""The programs that choose each row's next token, and say how likely it and others were.

R rows (sequences), T tokens of prompts, D d_model, V vocab, N best tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infer.sampling import SamplingRows, TokenCounts, sample
from model.layers import unembed
from model.transformer import Transformer, Variables, output_weights

MOST_LOGPROBS = 20
"""Best tokens whose log-probabilities may be asked for (the public interface of OpenAI allows as
many)."""
SCORED = 64
"""Tokens of prompts that are scored at a time: their logits alone are held."""


class Logprobs(NamedTuple):
    """Of the model's own logits, in nats."""

    chosen_R: jax.Array
    top_ids_RN: jax.Array
    top_RN: jax.Array
    """Of the best tokens, the best first."""


class Choice(NamedTuple):
    token_R: jax.Array
    """int32."""
    is_broken_R: jax.Array
    """Whether a row's logits hold a number that is not finite: its token means nothing."""
    logprobs: Logprobs
    """Zeros where not asked."""
    counts: TokenCounts
    """With the tokens of live rows."""


@partial(jax.jit, donate_argnums=2)
def choose(
    logits_RV: jax.Array,
    sampling: SamplingRows,
    counts: TokenCounts,
    position_R: jax.Array,
    is_live_R: jax.Array,
    allowed_RV: jax.Array,
    has_logprobs: jax.Array,
) -> Choice:
    """The next token of each row.

    Args:
      position_R: of the token before: each position has a draw of its own.
      is_live_R: rows whose token counts.
      allowed_RV: bool, tokens that may be taken.
      has_logprobs: whether some row asks for log-probabilities, bool [].
    """
    token_R = sample(logits_RV, sampling, counts, position_R, allowed_RV)
    row_R, more_R = jnp.arange(len(token_R)), is_live_R.astype(jnp.int32)
    counts = counts.replace(generated_BV=counts.generated_BV.at[row_R, token_R].add(more_R))
    is_broken_R = ~jnp.isfinite(logits_RV).all(axis=1)
    return Choice(token_R, is_broken_R, asked_logprobs(logits_RV, token_R, has_logprobs), counts)


def asked_logprobs(logits_RV: jax.Array, token_R: jax.Array, is_asked: jax.Array) -> Logprobs:
    """Of these tokens and the best ones; zeros where nobody asks, which costs nothing."""
    num_best = min(MOST_LOGPROBS, logits_RV.shape[1])
    dims = (len(token_R), num_best)

    def none() -> Logprobs:
        zeros_RN = jnp.zeros(dims, jnp.float32)
        return Logprobs(zeros_RN[:, 0], zeros_RN.astype(jnp.int32), zeros_RN)

    return jax.lax.cond(is_asked, lambda: _logprobs(logits_RV, token_R, num_best), none)


def _logprobs(logits_RV: jax.Array, token_R: jax.Array, num_best: int) -> Logprobs:
    nats_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    top_RN, ids_RN = jax.lax.top_k(nats_RV, num_best)
    chosen_R1 = jnp.take_along_axis(nats_RV, token_R[:, None], axis=1)
    return Logprobs(chosen_R1[:, 0], ids_RN.astype(jnp.int32), top_RN)


@partial(jax.jit, static_argnums=0)
def score_tokens(
    model: Transformer, variables: Variables, hidden_TD: jax.Array, next_T: jax.Array
) -> Logprobs:
    """Of the tokens that follow each hidden state, T in the place of R; T is a multiple of SCORED
    or below it."""
    w, size = output_weights(model, variables, as_stored=True), min(SCORED, len(next_T))
    num_best = min(MOST_LOGPROBS, model.config.vocab_size)

    def score(block: tuple[jax.Array, jax.Array]) -> Logprobs:
        hidden_SD, next_S = block
        return _logprobs(unembed(hidden_SD, w), next_S, num_best)

    blocks = (hidden_TD.reshape(-1, size, hidden_TD.shape[-1]), next_T.reshape(-1, size))
    made = jax.lax.map(score, blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)


@partial(jax.jit, donate_argnums=0)
def begin_counts(
    counts: TokenCounts, row: jax.Array, is_prompt_V: jax.Array, generated_V: jax.Array
) -> TokenCounts:
    """The counts with a row begun anew: its prompt holds these tokens, its text so many of each."""
    return TokenCounts(
        counts.generated_BV.at[row].set(generated_V), counts.is_prompt_BV.at[row].set(is_prompt_V)
    )
