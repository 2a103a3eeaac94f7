"""The logits of one text, every position: what parity checks compare.

L length, V vocab.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.checks import UserError
from model.layers import unembed
from model.model_state import init_memory, init_state
from model.transformer import Transformer, Variables, hidden_states, output_weights


def check_tokens(model: Transformer, tokens: Sequence[int]) -> None:
    """
    Raises:
      UserError: no tokens, too many, or ids outside the vocabulary.
    """
    config = model.config
    if not len(tokens):
        raise UserError("there are no tokens: give at least one")
    if min(tokens) < 0 or max(tokens) >= config.vocab_size:
        raise UserError(
            f"tokens lie in [{min(tokens)}, {max(tokens)}], the model's vocabulary is "
            f"[0, {config.vocab_size}): they are of another tokenizer"
        )
    if len(tokens) > config.context_length:
        raise UserError(
            f"{len(tokens)} tokens exceed the model's context_length={config.context_length}: "
            "give fewer"
        )


def full_logits(
    model: Transformer, variables: Variables, tokens: Sequence[int], *, mesh: Mesh | None = None
) -> np.ndarray:
    """Float32 [L, V]: row t predicts token t + 1 from tokens 0 to t, all in one pass.

    Args:
      mesh: where the variables lie; None is one device.
    Raises:
      UserError: see check_tokens.
    """
    check_tokens(model, tokens)
    tokens_BL = np.asarray([tokens], np.int32)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return np.asarray(_full(model, variables, tokens_BL))


@partial(jax.jit, static_argnums=0)
def _full(model: Transformer, variables: Variables, tokens_BL: jax.Array) -> jax.Array:
    positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
    memory = init_memory(model.config, 1, model.execution.compute_dtype)
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL, memory)
    return _logits(model, variables, hidden_BLD)


def cached_logits(
    model: Transformer, variables: Variables, tokens: Sequence[int], *, prompt: int = 1
) -> np.ndarray:
    """As `full_logits`, the first `prompt` tokens at once and then one by one through the state."""
    check_tokens(model, tokens)
    state = init_state(model.config, 1, len(tokens), model.execution.compute_dtype)
    rows, begin = [], 0
    for end in [prompt, *range(prompt + 1, len(tokens) + 1)]:
        tokens_BL = np.asarray([tokens[begin:end]], np.int32)
        positions_BL = np.arange(begin, end, dtype=np.int32)[None]
        logits_LV, state = _read(model, begin == 0, variables, tokens_BL, positions_BL, state)
        rows.append(np.asarray(logits_LV))
        begin = end
    return np.concatenate(rows)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _read(model, is_whole, variables, tokens_BL, positions_BL, state):
    hidden_BLD, state = hidden_states(
        model, variables, tokens_BL, positions_BL, state, is_whole=is_whole
    )
    return _logits(model, variables, hidden_BLD), state


def _logits(model: Transformer, variables: Variables, hidden_BLD: jax.Array) -> jax.Array:
    return unembed(hidden_BLD[0], output_weights(model, variables, as_stored=True))
