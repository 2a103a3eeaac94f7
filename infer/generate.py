"""Generation: one prefill of the prompts, then a token or a draft at a time through the cache.

B prompts, L tokens of the padded prompt, N tokens of a step, V vocab.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import UserError, require, require_seed
from infer.early_exit import check_exits, exit_step
from infer.generation import ActiveSequences, Generation, OnTokens, Timings
from infer.sampling import Sampling, sample
from infer.self_speculative import Draft, Verified, check_draft, draft_and_verify
from model.cache import init_cache
from model.seeds import seed_key
from model.transformer import (
    Cache,
    Preference,
    Transformer,
    Variables,
    hidden_states,
    output_weights,
)

SLOTS = 256
"""Caches have a whole multiple of them: each size is compiled for itself."""


def generate(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    on_tokens: OnTokens = lambda _: None,
    exit_threshold: float | None = None,
    draft: Draft | None = None,
    preference: Preference | None = None,
) -> Generation:
    """Continues each prompt until a stop token or max_new_tokens.

    Args:
      prompts: token lists, each beginning with the end-of-text token; lengths may differ.
      exit_threshold: new tokens leave the model at the first exit this sure of the next token (see
        infer/early_exit.py); prompts are read by all layers.
      draft: the first layers draft, the others verify (see infer/self_speculative.py): the same
        greedy text in fewer steps.
      preference: the experts that the prompts would rather have, a row each or one for all.
    Raises:
      UserError: an empty prompt, a token outside the vocabulary, more tokens than the context, or
        options that can't go together.
    """
    _check(model, prompts, max_new_tokens)
    require_seed(seed)
    options = DecodeOptions(sampling, seed_key(seed), exit_threshold, draft, preference)
    _check_options(model, options)
    began = time.monotonic()
    position_B = np.array([len(prompt) for prompt in prompts], np.int32)
    token_B, cache = _prefill(model, variables, options, prompts, max_new_tokens)
    rows = ActiveSequences(len(prompts), max_new_tokens, stop_ids, on_tokens)
    rows.add(np.asarray(token_B)[:, None], np.ones(len(prompts), int))
    timings = Timings(first_token_seconds=time.monotonic() - began)
    while not rows.is_done_B.all():
        step_began, is_live_B = time.monotonic(), ~rows.is_done_B
        step = _step(model, variables, options, token_B, position_B, cache)
        token_B, cache = step.token_B, step.cache
        added = rows.add(step.tokens_BN, step.count_B)
        # A row that has ended stays where it is, and so within its cache.
        position_B = position_B + np.where(is_live_B, step.count_B, 0).astype(np.int32)
        layers_N = None if step.layers_B is None else step.layers_B[is_live_B]
        timings.add(time.monotonic() - step_began, added, step.count_B[is_live_B], layers_N)
    return timings.generation(rows.outputs, has_draft=draft is not None)


@dataclass(frozen=True)
class DecodeOptions:
    """Options of a generation: how tokens are chosen and read."""

    sampling: Sampling
    key: jax.Array
    exit_threshold: float | None
    draft: Draft | None
    preference: Preference | None


class _Step(NamedTuple):
    tokens_BN: np.ndarray
    count_B: np.ndarray
    """Tokens of each row that hold."""
    token_B: jax.Array | np.ndarray
    """The last of them, in the kind that each step takes: another one would compile anew."""
    cache: Cache
    layers_B: np.ndarray | None
    """With exit_threshold: layers run."""


def _prefill(
    model: Transformer,
    variables: Variables,
    options: DecodeOptions,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> tuple[jax.Array, Cache]:
    """Each row's first token, and caches that hold the prompts and have room for the rest."""
    tokens_BL, positions_BL = _pad(prompts)
    spare = options.draft.length if options.draft else 0
    slots = _slots(model, max(map(len, prompts)) + max_new_tokens + spare)
    sizes = (len(prompts), slots, model.execution.compute_dtype, spare)
    cache = init_cache(model.config, *sizes, for_prompt=tokens_BL.shape[1] > 1)
    return prefill_step(
        model,
        options.sampling,
        variables,
        tokens_BL,
        positions_BL,
        cache,
        options.key,
        options.preference,
    )


def _step(
    model: Transformer,
    variables: Variables,
    options: DecodeOptions,
    token_B: jax.Array | np.ndarray,
    position_B: np.ndarray,
    cache: Cache,
) -> _Step:
    """Reads each row's last token, and drafts."""
    if options.draft is not None:
        made = _decode_draft(
            model, variables, options.draft, np.asarray(token_B), position_B, cache
        )
        tokens_BN, count_B = np.asarray(made.tokens_BN), np.asarray(made.count_B)
        last_B = np.take_along_axis(tokens_BN, count_B[:, None] - 1, axis=1)[:, 0]
        return _Step(tokens_BN, count_B, last_B, made.cache, None)
    place, layers_B = (token_B, position_B, cache, options.key), None
    if options.exit_threshold is None:
        token_B, cache = decode_step(model, options.sampling, variables, *place, options.preference)
    else:
        token_B, cache, layers = _decode_early(
            model, options.sampling, variables, *place, options.exit_threshold
        )
        layers_B = np.asarray(layers)
    tokens_BN = np.asarray(token_B)[:, None]
    return _Step(tokens_BN, np.ones(len(tokens_BN), int), token_B, cache, layers_B)


def _check_options(model: Transformer, options: DecodeOptions) -> None:
    given = {
        "exit_threshold": options.exit_threshold,
        "draft": options.draft,
        "a preference for experts": options.preference,
    }
    names = [name for name, value in given.items() if value is not None]
    require(len(names) < 2, f"{' and '.join(names)} can't go together: leave one out")
    if options.exit_threshold is not None:
        require(
            not math.isnan(options.exit_threshold),
            "exit_threshold is NaN, which no confidence reaches: give a number",
        )
        check_exits(model)
    if options.draft is not None:
        check_draft(model, options.draft)
        temperature = options.sampling.temperature
        require(
            temperature == 0,
            f"draft gives the greedy text, got temperature={temperature}: leave one out",
        )


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for prompt in prompts:
        if not len(prompt):
            raise UserError("a prompt is empty: it needs at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"a prompt has tokens outside [0, {config.vocab_size})")
        if len(prompt) + max_new_tokens > config.context_length:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                "model's "
                f"context_length={config.context_length}: shorten the prompt or ask for fewer"
            )


def _slots(model: Transformer, needed: int) -> int:
    """Slots of the caches: a conversation that grows is compiled anew only now and then."""
    longest = max(needed, model.config.context_length)
    return min(-(-needed // SLOTS) * SLOTS, longest)


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions [B, L], L a power of two so that few lengths are compiled; padding at
    -1.
    """
    longest = max(len(prompt) for prompt in prompts)
    length = 1 << (longest - 1).bit_length()
    tokens_BL = np.zeros((len(prompts), length), np.int32)
    positions_BL = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = prompt
        positions_BL[row, : len(prompt)] = np.arange(len(prompt))
    return tokens_BL, positions_BL


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def prefill_step(
    model: Transformer,
    sampling: Sampling,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    cache: Cache,
    key: jax.Array,
    preference: Preference | None,
) -> tuple[jax.Array, Cache]:
    """Reads the prompts; the next token [B] and the cache."""
    hidden_BLD, new_cache = hidden_states(
        model, variables, tokens_BL, positions_BL, cache, preference
    )
    last_B1 = jnp.argmax(positions_BL, axis=1, keepdims=True)
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B1[:, :, None], axis=1)[:, 0]
    return _next_token(model, sampling, variables, hidden_BD, key), cast(Cache, new_cache)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def decode_step(
    model: Transformer,
    sampling: Sampling,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
    key: jax.Array,
    preference: Preference | None,
) -> tuple[jax.Array, Cache]:
    """Reads one token per row; the next one and the cache."""
    hidden_B1D, new_cache = hidden_states(
        model, variables, token_B[:, None], position_B[:, None], cache, preference
    )
    token_B = _next_token(model, sampling, variables, hidden_B1D[:, 0], _at(key, position_B))
    return token_B, cast(Cache, new_cache)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _decode_early(
    model: Transformer,
    sampling: Sampling,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
    key: jax.Array,
    threshold: float,
) -> tuple[jax.Array, Cache, jax.Array]:
    """As decode_step, leaving at the first exit that is sure enough; and the layers run, [B]."""
    made = exit_step(model, variables, token_B, position_B, cache, threshold)
    token_B = sample(made.logits_BV, _at(key, position_B), sampling)
    return token_B, made.cache, made.layers_B


@partial(jax.jit, static_argnums=(0, 2), donate_argnums=5)
def _decode_draft(
    model: Transformer,
    variables: Variables,
    draft: Draft,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
) -> Verified:
    return draft_and_verify(model, variables, token_B, position_B, cache, draft)


def _at(key: jax.Array, position_B: jax.Array) -> jax.Array:
    """A key of this step's own: at each one a row moves on."""
    return jax.random.fold_in(key, position_B.sum())


def _next_token(
    model: Transformer,
    sampling: Sampling,
    variables: Variables,
    hidden_BD: jax.Array,
    key: jax.Array,
) -> jax.Array:
    w_DV = output_weights(model, variables)
    logits_BV = jnp.einsum("BD,DV->BV", hidden_BD, w_DV, preferred_element_type=jnp.float32)
    return sample(logits_BV, key, sampling)
