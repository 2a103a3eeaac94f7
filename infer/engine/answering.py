"""What a request is told: its new tokens up to where its text ends, and why it ends."""

from dataclasses import dataclass, field

import numpy as np

from infer.engine.sampler import Chosen
from infer.engine.sequence import TokenSequence
from infer.engine.types import ConstraintFailed, Emitted, Reason, TokenLogprobs


@dataclass
class Taken:
    """New tokens of a text."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: Reason | None = None
    """Why the text ended with them; None: it did not."""
    error: str | None = None


def take(sequence: TokenSequence, chosen: list[Chosen]) -> Taken:
    """Adds tokens to a text, up to its end."""
    taken = Taken()
    for one in chosen:
        taken.error = one.error or _refused(sequence, one.token)
        taken.reason = "error" if taken.error else _reason(sequence, one.token)
        if taken.reason in (None, "length", "stopped"):
            taken.tokens.append(one.token)
            taken.logprobs += [one.logprobs] if one.logprobs else []
        if taken.reason is not None:
            break
    return taken


def emitted_of(
    sequence: TokenSequence, taken: Taken, experts_TNK: np.ndarray | None = None
) -> Emitted:
    """The same as it is told; with the first of it, what is known of the prompt."""
    is_first, sequence.is_told = not sequence.is_told, True
    has_scores = is_first and sequence.request.prompt_logprobs and taken.reason != "cancelled"
    return Emitted(
        sequence.number,
        taken.tokens,
        taken.reason is not None,
        taken.reason,
        tuple(taken.logprobs),
        tuple(sequence.scores) if has_scores else None,
        (sequence.cached_tokens or 0) if is_first else 0,
        experts_TNK,
        taken.error,
    )


def _refused(sequence: TokenSequence, token: int) -> str | None:
    """Why a constraint does not go on with this token; None: it does, or there is none."""
    request = sequence.request
    if request.constraint is None or token in request.stop_ids:
        return None
    try:
        request.constraint.accept(token)
    except ConstraintFailed as error:
        return str(error)
    return None


def _reason(sequence: TokenSequence, token: int) -> Reason | None:
    """Adds a token to the text, unless it stops it; why the text ends with it."""
    request = sequence.request
    if token in request.stop_ids:
        return "stop"
    sequence.text.append(token)
    if request.is_stopped is not None and request.is_stopped(sequence.text):
        return "stopped"
    return "length" if len(sequence.text) == request.max_new_tokens else None
