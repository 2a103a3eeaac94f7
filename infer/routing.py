"""The experts that tokens go to while text is generated: what training replays.

A text that the engine has written is read again with its tokens given, the prompt whole and then
one token per row and step through a state, and the router's choices are kept. The engine reads
prompts in blocks, whose sums are taken in another order: between experts that are equal but for the
last bits it may have chosen otherwise while it wrote.

R rows (sequences), L tokens of the longest, K experts per token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from model.model_state import ModelState, init_state
from model.moe_layers import moe_layers
from model.step import OWN_CHOICE, make_step
from model.transformer import Transformer, Variables, forward_and_experts

SLOTS = 256
"""Slots of the state are a multiple of it: few sizes are compiled."""


def chosen_experts(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    length: int,
    rows: int | None = None,
) -> dict[str, np.ndarray] | None:
    """The experts of each token of prompts and texts, by MoE layer of the pattern.

    Args:
      length: L of the answer; what lies behind it is left out.
      rows: R, as the engine had it; None: as many as there are prompts.
    Returns:
      int32 [prompts, periods, L, K], OWN_CHOICE behind a sequence's end; None without experts.
    """
    layers = {name: layer for name, layer in moe_layers(model.config).items() if layer.periods}
    if not layers:
        return None
    rows = max(rows or len(prompts), len(prompts))
    sequences = [[*p, *t][:length] for p, t in zip(prompts, texts, strict=True)]
    slots = min(-(-length // SLOTS) * SLOTS, max(length, model.config.context_length))
    found = {
        name: np.full((rows, layer.count, length, layer.config.router.top_k), OWN_CHOICE, np.int32)
        for name, layer in layers.items()
    }
    widest = max(16, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens_RL, positions_RL = _padded([list(p)[:length] for p in prompts], rows, widest)
    dtype = model.execution.compute_dtype
    state, ids = _read_whole(model, slots, dtype, variables, tokens_RL, positions_RL)
    _keep(found, ids, positions_RL)
    for place in range(min(map(len, prompts)), max(map(len, sequences))):
        live = [len(p) <= place < len(s) for p, s in zip(prompts, sequences, strict=True)]
        live_R = np.array([*live, *[False] * (rows - len(live))])
        pairs = zip(sequences, live, strict=True)
        tokens = [s[place] if is_live else 0 for s, is_live in pairs]
        token_R1 = np.pad(np.array(tokens, np.int32), (0, rows - len(live)))[:, None]
        position_R1 = np.where(live_R, place, -1).astype(np.int32)[:, None]
        state, ids = _read_one(model, variables, token_R1, position_R1, state)
        _keep(found, ids, position_R1)
    return {name: x[: len(prompts)] for name, x in found.items()}


def _padded(
    sequences: Sequence[Sequence[int]], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens_RL = np.zeros((rows, width), np.int32)
    positions_RL = np.full((rows, width), -1, np.int32)
    for row, tokens in enumerate(sequences):
        tokens_RL[row, : len(tokens)] = tokens
        positions_RL[row, : len(tokens)] = np.arange(len(tokens))
    return tokens_RL, positions_RL


def _keep(found: dict[str, np.ndarray], ids: dict[str, Any], positions_RL: np.ndarray) -> None:
    """Writes a program's choices [periods, R, L, K] to the places of its tokens."""
    row_N, place_N = np.nonzero(positions_RL >= 0)
    for name, array in found.items():
        own_PNK = np.asarray(ids[name])[:, row_N, place_N]
        array[row_N, :, positions_RL[row_N, place_N]] = own_PNK.swapaxes(0, 1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read_whole(
    model: Transformer,
    slots: int,
    dtype: str,
    variables: Variables,
    tokens_RL: jax.Array,
    positions_RL: jax.Array,
) -> tuple[ModelState, dict[str, jax.Array]]:
    state = init_state(model.config, tokens_RL.shape[0], slots, dtype, tokens_RL.shape[1])
    step = make_step(tokens_RL, positions_RL, is_whole=True)
    return _read(model, variables, step, state)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read_one(
    model: Transformer,
    variables: Variables,
    token_R1: jax.Array,
    position_R1: jax.Array,
    state: ModelState,
) -> tuple[ModelState, dict[str, jax.Array]]:
    return _read(model, variables, make_step(token_R1, position_R1), state)


def _read(
    model: Transformer, variables: Variables, step: Any, state: ModelState
) -> tuple[ModelState, dict[str, jax.Array]]:
    _, new_state, chosen = forward_and_experts(model, variables, step, state)
    return cast(ModelState, new_state), chosen
