"""What an engine is asked, and what it answers.

V vocab, E experts, T tokens, N MoE layers, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from infer.expert_cache import PagingCounts
from infer.sampling import Sampling
from model.step import Preference

Reason = Literal["stop", "stopped", "length", "cancelled", "error"]
"""Why a text ended: at a stop id, by `is_stopped`, with max_new_tokens, by `cancel`, or because it
can't go on (Emitted.error says why)."""

GREEDY = Sampling()


class ConstraintFailed(Exception):
    """A constraint can't follow the text: its sentence is the request's error."""


class Constraint(Protocol):
    """What a text may say next: a grammar, a schema. Asked and told one token at a time."""

    def allowed_V(self) -> np.ndarray | None:
        """Whether each token may come next, bool [V]; None: all may.

        Raises:
          ConstraintFailed: it can't say.
        """
        ...

    def accept(self, token: int) -> None:
        """The text goes on with this token; not called for the stop id that ends it.

        Raises:
          ConstraintFailed: the token may not come here.
        """
        ...

    def rollback(self, n: int) -> None:
        """The last n accepted tokens are taken back."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to be continued."""

    prompt: Sequence[int]
    """Tokens, the end-of-text token first."""
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text, and are no part of it."""
    is_stopped: Callable[[list[int]], bool] | None = None
    """Asked after each token with the text so far: whether it has ended (stop strings)."""
    preference: Preference | None = None
    """The experts it would rather have, [periods, 1, E] by layer of the pattern."""
    num_logprobs: int | None = None
    """Log-probabilities of each new token and of so many of the best ones, by the model's own
    logits: before temperature, penalties, biases and constraints. 0: of the token alone."""
    prompt_logprobs: bool = False
    """Also of the prompt's tokens, after the first; its prefix is then read anew."""
    wants_experts: bool = False
    """The experts of each token that is read; the prompt's prefix is then read anew. Of an engine
    that keeps them (EngineOptions.keeps_experts)."""
    cache_salt: str = ""
    """Prefixes are shared among requests of equal salt alone."""
    constraint: Constraint | None = None
    """A text that it does not allow ends with an error, and never goes on without it."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, in nats, and those of the best tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The best first."""


@dataclass(frozen=True)
class Emitted:
    """What a step gave one request."""

    request: int
    tokens: list[int]
    """New tokens of its text, in order."""
    is_done: bool
    reason: Reason | None = None
    """Why it is done; None while it is not."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token, where asked."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With a request's first tokens, where asked: one for each of the prompt's tokens, None for the
    first."""
    cached_tokens: int = 0
    """With a request's first tokens: how many of the prompt's came from the prefix cache."""
    experts_TNK: np.ndarray | None = None
    """With a request's last tokens, where asked: the experts of every token that was read, int32,
    by MoE layer of the pattern in the order of their depth; -1 is none. The last token of a text
    was not read, unless one that stops it came after it."""
    error: str | None = None
    """A sentence, with reason "error"."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done."""

    running: int
    """Requests that have a row."""
    waiting: int
    free_pages: int
    """Pages that a request could get now, those that keep prefixes for later among them; 0 without
    pages."""
    num_pages: int
    """All pages, without page 0."""
    prefix_queries: int
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int
    """How many of these were found."""
    preemptions: int
    prompt_tokens: int
    """Of the requests that were given a row."""
    generated_tokens: int
    expert_tokens: tuple[np.ndarray, ...] = ()
    """Tokens that each expert worked on, int64 [E] of each MoE layer; nothing where the engine does
    not keep experts."""
    paging: PagingCounts | None = None
    """Of experts that are brought when they are needed; None: all are there."""
