"""POST /v1/completions, and the routes by which editors ask for what belongs between two texts."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from data.tokenizers.text_stream import TextStream
from infer.engine import TokenLogprobs
from infer.server.errors import invalid
from infer.server.plan import TextPlan, check_text, make_requests, room_for, stop_texts
from infer.server.schemas import CompletionBody
from infer.server.served_model import ServedModel
from infer.server.service import (
    Answer,
    Call,
    Service,
    event,
    merged,
    new_id,
    usage_of,
    with_experts,
)
from infer.server.structured import wanted_grammar
from infer.server.token_texts import TokenTexts

DEFAULT_NEW_TOKENS = 16
"""As OpenAI's interface has it."""


async def complete(service: Service, call: Call) -> Any:
    """Continues each prompt, n times."""
    body: CompletionBody = call.body
    model = service.model
    model.check_name(body.model)
    plans = _plans(model, body)
    requests = await make_requests(model, body, plans, wanted_grammar(body, body.response_format))
    common = {"id": new_id("cmpl-"), "created": int(time.time()), "model": model.name}
    if body.stream:
        return _events(service, call, plans, requests, common)
    async with service.answers(plans, requests) as answers:
        texts = [_Collected() for _ in answers]
        async for i, piece in merged([answer.pieces() for answer in answers]):
            texts[i].add(piece)
        choices = [
            _choice(model, body, i, answer, text)
            for i, (answer, text) in enumerate(zip(answers, texts, strict=True))
        ]
        usage = _usage(answers, body)
    call.count(usage)
    return common | {"object": "text_completion", "choices": choices, "usage": usage.openai()}


class _Collected:
    """A whole text."""

    def __init__(self) -> None:
        self.text, self.finish = "", "length"
        self.logprobs: list[TokenLogprobs] = []

    def add(self, piece: Any) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish


def _plans(model: ServedModel, body: CompletionBody) -> list[TextPlan]:
    if body.echo and body.suffix is not None:
        raise invalid("echo and suffix can't go together: leave one out", "echo")
    if body.echo and body.stream and body.logprobs is not None:
        raise invalid("echo with logprobs is not streamed: leave stream out", "stream")
    wanted = DEFAULT_NEW_TOKENS if body.max_tokens is None else body.max_tokens
    if wanted == 0 and not body.echo:
        raise invalid("max_tokens=0 asks for nothing without echo: ask for a token", "max_tokens")
    plans = []
    for prompt in prompts_of(body.prompt):
        ids = _prompt_ids(model, prompt, body.suffix)
        plans.append(
            TextPlan(
                ids,
                room_for(model, ids, max(wanted, 1), "prompt"),
                stop_texts(body),
                stands_alone=body.suffix is not None,
                num_logprobs=body.logprobs,
                prompt_logprobs=bool(body.echo) and body.logprobs is not None,
                wants_experts=body.return_routed_experts,
            )
        )
    return plans


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """Each prompt of a body: a text, tokens, or a list of either."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _prompt_ids(model: ServedModel, prompt: str | list[int], suffix: str | None) -> list[int]:
    if suffix is not None:
        if not isinstance(prompt, str):
            raise invalid("a suffix goes with a prompt of text, got token ids", "suffix")
        return infill_ids(model, prompt, suffix)
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(check_text(prompt, "prompt")) or first_ids(model)
        if not ids:
            raise invalid("the prompt is empty: it needs at least one token", "prompt")
        return ids
    return prompt


def first_ids(model: ServedModel) -> list[int]:
    """What begins a text of which nothing is there yet."""
    tokenizer = model.tokenizer
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [] if begin is None else [begin]


def infill_ids(model: ServedModel, prefix: str, suffix: str) -> list[int]:
    """The prompt of a middle.

    Raises:
      ApiError: a model that was not trained for it.
    """
    if model.marks is None:
        raise invalid(
            "this model fills in no middle: its tokenizer has no tokens for that (such as "
            "<fim_prefix>); leave suffix out, or serve a model that was trained for it",
            "suffix",
            "no_infilling",
        )
    begin, after, middle = model.marks
    encode = model.tokenizer.encode
    before, behind = (encode(check_text(x, "prompt"), bos=False) for x in (prefix, suffix))
    bos = encode("")
    return [*bos, begin, *before, after, *behind, middle]


def _usage(answers: Sequence[Answer], body: CompletionBody) -> Any:
    usage = usage_of(answers)
    if body.max_tokens == 0:
        usage.completion_tokens = 0
    return usage


def _choice(
    model: ServedModel, body: CompletionBody, index: int, answer: Answer, said: _Collected
) -> dict[str, Any]:
    text, logprobs = said.text, said.logprobs
    finish = said.finish
    if body.max_tokens == 0:  # the engine gives one at least: it is not shown
        text, logprobs, finish = "", [], "length"
    prompt = answer.plan.prompt
    shown = None
    if body.logprobs is not None:
        echoed = list(answer.prompt_logprobs) if body.echo else []
        shown = legacy_logprobs(model.texts, prompt, echoed, logprobs, echo=bool(body.echo))
    if body.echo:
        text = model.tokenizer.decode(prompt) + text
    chunk = _chunk(index, text, shown, finish) | {"stop_reason": answer.stopped_by}
    return with_experts(chunk, answer)


def legacy_logprobs(
    texts: TokenTexts,
    prompt: Sequence[int],
    echoed: Sequence[TokenLogprobs | None],
    new: Sequence[TokenLogprobs],
    *,
    echo: bool,
    offset: int = 0,
) -> dict[str, Any]:
    """The four lists of the completions' interface: of the prompt's tokens (the first has none),
    and of the new ones."""
    entries: list[tuple[int, TokenLogprobs | None]] = []
    if echo:
        entries += zip(prompt, echoed, strict=True)
    entries += [(each.token, each) for each in new]
    before = () if echo else prompt[-8:]
    stream, offsets, length = TextStream(texts.tokenizer, before), [], offset
    for token, _ in entries:
        offsets.append(length)
        length += len(stream.add([token]))
    return {
        "tokens": [texts.text_of(token) for token, _ in entries],
        "token_logprobs": [None if x is None else x.logprob for _, x in entries],
        "top_logprobs": [None if x is None else _top(texts, x) for _, x in entries],
        "text_offset": offsets,
    }


def _top(texts: TokenTexts, entry: TokenLogprobs) -> dict[str, float]:
    """The best tokens and the one itself; of those with one text the best."""
    found: dict[str, float] = {}
    for token, logprob in ((entry.token, entry.logprob), *entry.top):
        text = texts.text_of(token)
        found[text] = max(logprob, found.get(text, logprob))
    return found


async def _events(
    service: Service, call: Call, plans: list[TextPlan], requests: list[Any], common: dict[str, Any]
) -> AsyncIterator[str]:
    body: CompletionBody = call.body
    common |= {"object": "text_completion"}
    options = body.stream_options
    async with service.answers(plans, requests) as answers:
        lengths = [0] * len(answers)
        for i, answer in enumerate(answers):
            if body.echo:
                text = service.model.tokenizer.decode(answer.plan.prompt)
                lengths[i] = len(text)
                yield event(common | {"choices": [_chunk(i, text, None, None)]})
        async for i, piece in merged([answer.pieces() for answer in answers]):
            if not (piece.text or piece.logprobs or piece.finish):
                continue
            shown = None
            if body.logprobs is not None:
                shown = legacy_logprobs(
                    service.model.texts,
                    answers[i].plan.prompt,
                    (),
                    piece.logprobs,
                    echo=False,
                    offset=lengths[i],
                )
            lengths[i] += len(piece.text)
            text = "" if body.max_tokens == 0 else piece.text
            chunk = _chunk(i, text, shown, piece.finish)
            chunk = with_experts(chunk, answers[i]) if piece.finish else chunk
            yield event(common | {"choices": [chunk]})
        usage = _usage(answers, body)
    call.count(usage)
    if options is not None and options.include_usage:
        yield event(common | {"choices": [], "usage": usage.openai()})
    yield event("[DONE]")


def _chunk(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
