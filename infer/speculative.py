"""Verifying drafts: one pass over a few tokens of each row, of which those hold that it would have
chosen itself.

A draft says one token for certain, so that to accept it with its probability and else to draw from
the rest is to draw a token and see whether it is the draft's: rejection sampling (Leviathan et al.
2023) without a second draw. Each position has its own draw, as without a draft, so the text is the
same but for rounding: the sums over more tokens at once are taken in another order.

R rows (sequences), N tokens of a row: the newest and its draft, V vocab.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from infer.choice import Logprobs, choose
from infer.sampling import SamplingRows, TokenCounts
from infer.steps import laid_out, run
from model.layers import unembed
from model.model_state import ModelState, rewind
from model.step import ChosenExperts, Preference, Step, make_step
from model.transformer import Transformer, Variables, output_weights


class VerifiedDraft(NamedTuple):
    tokens_RN: jax.Array
    """What is chosen after each token read, int32; the first count_R of them hold."""
    count_R: jax.Array
    is_broken_RN: jax.Array
    """See Choice."""
    logprobs: Logprobs
    """With N after R in each array."""
    counts: TokenCounts
    state: ModelState | None
    chosen: ChosenExperts | None
    """Where asked, the experts of each token that was read."""
    hidden_RND: jax.Array | None
    """Where asked, what the output layer read."""


@partial(jax.jit, static_argnums=(0, 12, 13), donate_argnums=(4, 8))
def verify(
    model: Transformer,
    variables: Variables,
    tokens_RN: jax.Array,
    positions_RN: jax.Array,
    state: ModelState,
    tables_RP: jax.Array | None,
    preference: Preference | None,
    sampling: SamplingRows,
    counts: TokenCounts,
    allowed_NRV: jax.Array,
    is_live_R: jax.Array,
    has_logprobs: jax.Array,
    with_experts: bool = False,
    with_hidden: bool = False,
) -> VerifiedDraft:
    """Reads each row's newest token and the draft that follows it.

    Args:
      positions_RN: int32; -1 where a row's draft is shorter, and for rows that do nothing.
      state: with room for N tokens; what lies there from the newest token on is forgotten first.
      is_live_R: rows whose tokens count; others have no draft, and read alone.
    """
    step, state = begin_verify(tokens_RN, positions_RN, state, tables_RP, preference)
    hidden_RND, state, chosen = run(model, variables, step, state, with_experts)
    choice = (sampling, counts, allowed_NRV, is_live_R, has_logprobs)
    made = end_verify(model, variables, hidden_RND, step, *choice, with_hidden)
    return made._replace(state=laid_out(state), chosen=chosen)


def begin_verify(
    tokens_RN: jax.Array,
    positions_RN: jax.Array,
    state: ModelState,
    tables_RP: jax.Array | None,
    preference: Preference | None,
) -> tuple[Step, ModelState]:
    """What the model reads, and the state without what lies from the newest tokens on."""
    first_R, none = positions_RN[:, 0], jnp.iinfo(jnp.int32).max
    state = rewind(state, jnp.where(first_R >= 0, first_R, none))
    return make_step(tokens_RN, positions_RN, tables_RN=tables_RP, preference=preference), state


def end_verify(
    model: Transformer,
    variables: Variables,
    hidden_RND: jax.Array,
    step: Step,
    sampling: SamplingRows,
    counts: TokenCounts,
    allowed_NRV: jax.Array,
    is_live_R: jax.Array,
    has_logprobs: jax.Array,
    with_hidden: bool = False,
) -> VerifiedDraft:
    """What is chosen after what the model gave; without its state and experts."""
    tokens_RN, positions_RN = step.tokens_BL, step.positions_BL
    is_row_R = positions_RN[:, 0] >= 0
    logits_RNV = unembed(hidden_RND, output_weights(model, variables, as_stored=True))
    length = tokens_RN.shape[1]
    after_RN = jnp.pad(tokens_RN[:, 1:], ((0, 0), (0, 1)))
    is_drafted_RN = jnp.pad(positions_RN[:, 1:] >= 0, ((0, 0), (0, 1)))

    def choose_at(carry: tuple[TokenCounts, jax.Array], n: jax.Array) -> Any:
        counts, is_on_R = carry
        place = (positions_RN[:, n], is_on_R, allowed_NRV[n], has_logprobs)
        choice = choose(logits_RNV[:, n], sampling, counts, *place)
        holds_R = is_drafted_RN[:, n] & (after_RN[:, n] == choice.token_R) & ~choice.is_broken_R
        return (choice.counts, is_on_R & holds_R), (choice._replace(counts=None), is_on_R)

    begun = (counts, is_row_R & is_live_R)
    (counts, _), (made, is_on_NR) = jax.lax.scan(choose_at, begun, jnp.arange(length))
    made = jax.tree.map(lambda x: x.swapaxes(0, 1), made)
    return VerifiedDraft(
        made.token_R,
        is_on_NR.sum(axis=0, dtype=jnp.int32),
        made.is_broken_R,
        made.logprobs,
        counts,
        state=None,
        chosen=None,
        hidden_RND=hidden_RND if with_hidden else None,
    )
