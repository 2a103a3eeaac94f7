"""Generation: one prefill of the prompts, then a token at a time through the cache.

B prompts, L tokens of the padded prompt, V vocab.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import UserError
from infer.early_exit import check_exits, exit_step
from infer.sampling import Sampling, sample
from model.cache import init_cache
from model.transformer import (
    Cache,
    Preference,
    Transformer,
    Variables,
    hidden_states,
    output_weights,
)

OnTokens = Callable[[np.ndarray], None]
"""Called after each step with each row's new token, int32 [B]; -1 for rows that have ended."""


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]
    """New tokens of each prompt, without the one that stopped it."""
    first_token_seconds: float
    """From the call to the first token, compilation included."""
    tokens_per_second: float
    """Over all rows, after the first token; compilation of the decode step left out."""
    mean_layers: float | None = None
    """With exit_threshold: layers that a token after the first went through, on average."""


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
    preference: Preference | None = None,
) -> Generation:
    """Continues each prompt until a stop token or max_new_tokens.

    Args:
      prompts: token lists, each beginning with the end-of-text token; lengths may differ.
      exit_threshold: new tokens leave the model at the first exit this sure of the next token (see
        infer/early_exit.py); prompts are read by all layers.
      preference: the experts that the prompts would rather have, a row each or one for all.
    Raises:
      UserError: an empty prompt, a token outside the vocabulary, or more tokens than the context.
    """
    _check(model, prompts, max_new_tokens)
    if exit_threshold is not None:
        _check_exit(model, preference)
    began = time.monotonic()
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BL, positions_BL = _pad(prompts)
    dtype = model.execution.compute_dtype
    cache = init_cache(model.config, len(prompts), int(lengths_B.max()) + max_new_tokens, dtype)
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    token_B, cache = _prefill(
        model, sampling, variables, tokens_BL, positions_BL, cache, keys[0], preference
    )

    outputs: list[list[int]] = [[] for _ in prompts]
    is_done_B = np.zeros(len(prompts), bool)
    first_seconds = 0.0
    step_seconds: list[float] = []
    layers_run: list[int] = []
    for i in range(max_new_tokens):
        step_began = time.monotonic()
        if i:
            new = (token_B, lengths_B + i - 1, cache, keys[i])
            if exit_threshold is None:
                token_B, cache = _decode(model, sampling, variables, *new, preference)
            else:
                token_B, cache, layers_B = _decode_early(
                    model, sampling, variables, *new, exit_threshold
                )
                layers_run += np.asarray(layers_B)[~is_done_B].tolist()
        host_B = np.asarray(token_B)
        if i:
            step_seconds.append(time.monotonic() - step_began)
        else:
            first_seconds = time.monotonic() - began
        is_done_B |= np.isin(host_B, list(stop_ids))
        for row in np.flatnonzero(~is_done_B):
            outputs[row].append(int(host_B[row]))
        on_tokens(np.where(is_done_B, -1, host_B))
        if is_done_B.all():
            break
    timed = step_seconds[1:]
    rate = len(prompts) * len(timed) / sum(timed) if timed else 0.0
    mean_layers = float(np.mean(layers_run)) if layers_run else None
    return Generation(outputs, first_seconds, rate, mean_layers)


def _check_exit(model: Transformer, preference: Preference | None) -> None:
    check_exits(model)
    if preference is not None:
        raise UserError(
            "exit_threshold and a preference for experts can't go together: leave one out"
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
def _prefill(
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
def _decode(
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
    token_B = _next_token(model, sampling, variables, hidden_B1D[:, 0], key)
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
    """As _decode, leaving at the first exit that is sure enough; and the layers run, [B]."""
    step = exit_step(model, variables, token_B, position_B, cache, threshold)
    return sample(step.logits_BV, key, sampling), step.cache, step.layers_B


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
