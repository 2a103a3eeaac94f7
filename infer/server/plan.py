"""A body's settings as the engine's requests."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.checks import UserError
from infer.engine import Request
from infer.sampling import Sampling
from infer.server.errors import invalid
from infer.server.reply_text import ReplyText, Thinking
from infer.server.schemas import SamplingFields
from infer.server.served_model import ServedModel
from infer.server.structured import GrammarConstraint, Wanted, compiled

LARGEST_SEED = 2**63


@dataclass(frozen=True)
class TextPlan:
    """How a prompt is to be continued, and how its text is read."""

    prompt: Sequence[int]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    stands_alone: bool = False
    """Whether the text is one of its own (an answer), or goes on from the prompt's."""
    thinking: Thinking = "never"
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    wants_experts: bool = False

    def reply_text(self, model: ServedModel) -> ReplyText:
        before = () if self.stands_alone else self.prompt
        return ReplyText(model.tokenizer, before, self.stops, self.thinking)


def room_for(model: ServedModel, prompt: Sequence[int], wanted: int | None, param: str) -> int:
    """New tokens at most: what was asked for, or all that there is room for.

    Raises:
      ApiError: no room for one.
    """
    room = model.max_length - len(prompt)
    if room < 1:
        raise invalid(
            f"this model's maximum context length is {model.max_length} tokens, and {param} has "
            f"{len(prompt)}, which leaves no room for a new one: shorten it",
            param,
            "context_length_exceeded",
        )
    return room if wanted is None else min(wanted, room)


def stop_texts(body: SamplingFields) -> tuple[str, ...]:
    """Texts that end an answer; an empty one ends nothing."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return tuple(stop for stop in stops if stop)


def check_text(text: str, param: str) -> str:
    """The text, if a tokenizer can read it.

    Raises:
      ApiError: it is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{param} is no UTF-8 at character {error.start + 1}", param) from error
    return text


async def make_requests(
    model: ServedModel, body: SamplingFields, plans: Sequence[TextPlan], wanted: Wanted | None
) -> list[Request]:
    """n requests of each plan, in order.

    Raises:
      ApiError: settings that can't be followed.
    """
    constraint = None if wanted is None else await compiled(model.texts, wanted)
    preference = model.preference(body.expert_preference)
    base = secrets.randbelow(LARGEST_SEED) if body.seed is None else body.seed
    count = body.n or 1
    stop_ids = frozenset() if body.ignore_eos else model.tokenizer.eos_ids
    stop_ids |= frozenset(body.stop_token_ids or ())
    samplings = [_sampling(body, (base + i) % LARGEST_SEED) for i in range(count)]
    return [
        Request(
            plan.prompt,
            plan.max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            is_stopped=_stopper(model, plan),
            preference=preference,
            num_logprobs=plan.num_logprobs,
            prompt_logprobs=plan.prompt_logprobs,
            cache_salt=body.cache_salt or "",
            constraint=_copy(constraint),
            wants_experts=plan.wants_experts,
        )
        for plan in plans
        for sampling in samplings
    ]


def _copy(constraint: GrammarConstraint | None) -> GrammarConstraint | None:
    return None if constraint is None else constraint.copy()


def _sampling(body: SamplingFields, seed: int) -> Sampling:
    """With temperature 0 the most likely token is taken, which no cut leaves out."""
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    cuts: dict[str, Any] = {}
    if temperature > 0:
        top_k = body.top_k or 0
        cuts = {"top_p": body.top_p or 1.0, "top_k": max(top_k, 0), "min_p": body.min_p or 0.0}
    try:
        biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    except ValueError as error:
        raise invalid(f"logit_bias: its keys must be token ids ({error})", "logit_bias") from error
    try:
        return Sampling(
            temperature=temperature,
            repetition_penalty=float(body.repetition_penalty or 1.0),
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            logit_bias=biases,
            seed=seed,
            **cuts,
        )
    except UserError as error:
        raise invalid(str(error)) from error


def _stopper(model: ServedModel, plan: TextPlan) -> Callable[[list[int]], bool] | None:
    """Whether a text has come to a stop text, asked with all of its tokens each time: reads each
    once."""
    if not plan.stops:
        return None
    text, seen = plan.reply_text(model), 0

    def is_stopped(tokens: list[int]) -> bool:
        nonlocal seen
        text.add(tokens[seen:])
        seen = len(tokens)
        return text.is_stopped

    return is_stopped
