"""Choosing the next token from logits, each row of a batch by its own settings.

Settings are arrays, not part of the program: other temperatures compile nothing anew, and what a
row gets depends on its own logits, settings, seed and position alone.

B rows, V vocab, N biased tokens.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from configs.checks import UserError, require, require_seed
from model.seeds import seed_key

MOST_BIASES = 300
"""Tokens whose logits a request may shift (the public interface of OpenAI allows as many)."""


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are greedy.

    In this order: penalties and biases change the logits; a temperature of 0 takes the best of
    them; else logits / temperature are cut to the top_k best, to the fewest that reach top_p, and
    to those with at least min_p of the best one's probability, and one is drawn.
    """

    temperature: float = 0.0
    """0 takes the most likely token; above it, softmax(logits / temperature) is sampled."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach top_p (Holtzman et al. 2019)."""
    top_k: int = 0
    """Sample among so many of the best tokens; 0 is no bound."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the best one's probability (Nguyen et al.
    2024)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the text are divided by it, negative ones multiplied (CTRL,
    Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the text, without its prompt, holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the text, without its prompt, holds it."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """What is added to the logits of these tokens."""
    seed: int = 0
    """Of the row's draws: an equal request gets an equal text."""

    def __post_init__(self) -> None:
        pairs = dict(self.logit_bias).items()
        object.__setattr__(self, "logit_bias", tuple(sorted(pairs)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                hint = "; 0 is greedy" if field.name == "temperature" else ""
                raise UserError(f"{field.name}={value} must be a finite number{hint}")
        require_seed(self.seed)
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 is no bound")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]")
        penalty = self.repetition_penalty
        require(penalty > 0, f"repetition_penalty={penalty} must be greater than 0; 1 is none")
        for name, unset in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            value = getattr(self, name)
            require(
                self.temperature > 0 or value == unset,
                f"{name}={value} has no effect with temperature=0: set a temperature",
            )
        count = len(self.biases)
        require(
            count <= MOST_BIASES, f"logit_bias has {count} tokens, at most {MOST_BIASES} may have"
        )
        for token, bias in self.biases:
            require(
                token >= 0 and math.isfinite(bias),
                f"logit_bias[{token}]={bias} must be a finite number for a token id from 0 on",
            )

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias in pairs, by token."""
        return cast(Any, self.logit_bias)


class SamplingRows(struct.PyTreeNode):
    """The settings of each row, as a program takes them."""

    temperature_B: Any
    top_p_B: Any
    top_k_B: Any
    min_p_B: Any
    repetition_B: Any
    presence_B: Any
    frequency_B: Any
    bias_ids_BN: Any
    """int32; -1 where there is none."""
    bias_BN: Any
    key_B2: Any
    """uint32, the data of each row's random key."""


class TokenCounts(struct.PyTreeNode):
    """What each row's text holds, for penalties."""

    generated_BV: jax.Array
    """int32, how often the text without its prompt holds each token."""
    is_prompt_BV: jax.Array
    """bool, whether the prompt holds it."""


def sampling_rows(settings: Sequence[Sampling]) -> SamplingRows:
    """Arrays in numpy of these settings, a row each."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    bias_ids_BN = np.full((len(settings), MOST_BIASES), -1, np.int32)
    bias_BN = np.zeros((len(settings), MOST_BIASES), np.float32)
    for row, setting in enumerate(settings):
        for place, (token, bias) in enumerate(setting.biases):
            bias_ids_BN[row, place], bias_BN[row, place] = token, bias
    keys = [_key_of(s.seed) for s in settings]
    return SamplingRows(
        temperature_B=column("temperature", np.float32),
        top_p_B=column("top_p", np.float32),
        top_k_B=column("top_k", np.int32),
        min_p_B=column("min_p", np.float32),
        repetition_B=column("repetition_penalty", np.float32),
        presence_B=column("presence_penalty", np.float32),
        frequency_B=column("frequency_penalty", np.float32),
        bias_ids_BN=bias_ids_BN,
        bias_BN=bias_BN,
        key_B2=np.stack(keys),
    )


@lru_cache(maxsize=4096)
def _key_of(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(seed_key(seed)))


def no_counts(num_rows: int, vocab_size: int) -> TokenCounts:
    shape = (num_rows, vocab_size)
    return TokenCounts(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_))


def sample(
    logits_BV: jax.Array,
    rows: SamplingRows,
    counts: TokenCounts,
    position_B: jax.Array,
    allowed_BV: jax.Array | None = None,
) -> jax.Array:
    """One token per row, int32 [B].

    Args:
      logits_BV: float32 [B, V].
      position_B: int32, of the token before: each position has a draw of its own.
      allowed_BV: bool, tokens that may be taken, at least one of a row; None: all.
    """
    logits_BV = _shifted(logits_BV, rows, counts)
    if allowed_BV is not None:
        logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        drawn_B = _drawn(logits_BV, rows, position_B)
        return jnp.where(rows.temperature_B > 0, drawn_B, best_B)

    return jax.lax.cond((rows.temperature_B > 0).any(), draw, lambda: best_B)


def _shifted(logits_BV: jax.Array, rows: SamplingRows, counts: TokenCounts) -> jax.Array:
    """The logits after penalties and biases."""

    def penalised() -> jax.Array:
        is_generated_BV = counts.generated_BV > 0
        factor_B1 = rows.repetition_B[:, None]
        lower_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
        shifted_BV = jnp.where(is_generated_BV | counts.is_prompt_BV, lower_BV, logits_BV)
        shifted_BV -= rows.frequency_B[:, None] * counts.generated_BV
        return shifted_BV - rows.presence_B[:, None] * is_generated_BV

    def biased(logits_BV: jax.Array) -> jax.Array:
        row_B1, vocab = jnp.arange(len(logits_BV))[:, None], logits_BV.shape[1]
        ids_BN = jnp.where(rows.bias_ids_BN >= 0, rows.bias_ids_BN, vocab)  # past the end: dropped
        return logits_BV.at[row_B1, ids_BN].add(rows.bias_BN, mode="drop")

    has_penalty_B = (rows.repetition_B != 1) | (rows.presence_B != 0) | (rows.frequency_B != 0)
    logits_BV = jax.lax.cond(has_penalty_B.any(), penalised, lambda: logits_BV)
    return jax.lax.cond((rows.bias_ids_BN >= 0).any(), biased, lambda x: x, logits_BV)


def _drawn(logits_BV: jax.Array, rows: SamplingRows, position_B: jax.Array) -> jax.Array:
    # The best logit becomes 0 first, so that the coldest temperature still tends to greedy, where
    # the quotients themselves would overflow.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    coldest = float(np.finfo(np.float32).tiny)
    logits_BV = logits_BV / jnp.maximum(rows.temperature_B, coldest)[:, None]
    is_cut = ((rows.top_p_B < 1) | (rows.top_k_B > 0) | (rows.min_p_B > 0)).any()
    logits_BV = jax.lax.cond(is_cut, _cut, lambda logits_BV, _: logits_BV, logits_BV, rows)

    def draw_row(key_2: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw_row)(rows.key_B2, position_B, logits_BV).astype(jnp.int32)


def _cut(logits_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """-inf for what top_k, top_p and min_p leave out; what equals the last one kept stays."""
    vocab = logits_BV.shape[1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    top_k_B1 = jnp.where(rows.top_k_B > 0, rows.top_k_B, vocab)[:, None]
    rank_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    is_top_BV = rank_BV < top_k_B1
    p_BV = jax.nn.softmax(jnp.where(is_top_BV, sorted_BV, -jnp.inf), axis=-1)
    mass_before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    is_kept_BV = is_top_BV & (mass_before_BV < rows.top_p_B[:, None])
    is_kept_BV &= p_BV >= rows.min_p_B[:, None] * p_BV[:, :1]
    last_B1 = jnp.maximum(is_kept_BV.sum(axis=-1, keepdims=True) - 1, 0)
    least_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
