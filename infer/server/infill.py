"""POST /infill, as llama.cpp's server has it: what editors ask for."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from infer.server.completions import complete, infill_ids
from infer.server.plan import TextPlan, make_requests, room_for, stop_texts
from infer.server.schemas_small import InfillBody
from infer.server.service import Answer, Call, Service, event, usage_of
from infer.server.structured import wanted_grammar

DEFAULT_NEW_TOKENS = 128


async def infill(service: Service, call: Call) -> Any:
    """What belongs between a prefix and a suffix. With n_predict 0 the prompt is only read, so that
    it is in the cache."""
    body: InfillBody = call.body
    model = service.model
    model.check_name(body.model)
    extra = "".join(_file(x.filename, x.text) for x in body.input_extra or ())
    ids = infill_ids(model, extra + body.input_prefix + (body.prompt or ""), body.input_suffix)
    wanted = DEFAULT_NEW_TOKENS if body.n_predict in (None, -1) else body.n_predict
    is_read_only = wanted == 0
    plan = TextPlan(
        ids,
        room_for(model, ids, max(wanted or 0, 1), "input_prefix"),
        stop_texts(body),
        stands_alone=True,
    )
    requests = await make_requests(model, body, [plan], wanted_grammar(body, None))
    if body.stream:
        return _events(service, call, plan, requests, is_read_only=is_read_only)
    began, text, finish = time.monotonic(), "", "length"
    async with service.answers([plan], requests[:1]) as (answer,):
        async for piece in answer.pieces():
            text, finish = text + piece.text, piece.finish or finish
        call.count(usage_of([answer]))
    return _answer(service, answer, "" if is_read_only else text, finish, began)


def _file(name: str | None, text: str) -> str:
    return f"{text}\n" if name is None else f"# {name}\n{text}\n"


def _answer(
    service: Service, answer: Answer, text: str, finish: str, began: float
) -> dict[str, Any]:
    seconds = max(time.monotonic() - began, 1e-6)
    count = answer.num_tokens
    return {
        "content": text,
        "stop": True,
        "model": service.model.name,
        "stop_type": "limit" if finish == "length" else "word",
        "truncated": False,
        "tokens_predicted": count,
        "tokens_evaluated": len(answer.plan.prompt),
        "tokens_cached": answer.cached_tokens,
        "generation_settings": {"n_ctx": service.model.max_length},
        "timings": {
            "prompt_n": len(answer.plan.prompt) - answer.cached_tokens,
            "prompt_ms": 0.0,
            "predicted_n": count,
            "predicted_ms": 1000 * seconds,
            "predicted_per_second": count / seconds,
        },
    }


async def _events(
    service: Service, call: Call, plan: TextPlan, requests: list[Any], *, is_read_only: bool
) -> AsyncIterator[str]:
    began, finish = time.monotonic(), "length"
    async with service.answers([plan], requests[:1]) as (answer,):
        async for piece in answer.pieces():
            finish = piece.finish or finish
            if piece.text and not is_read_only:
                yield event({"content": piece.text, "stop": False})
        call.count(usage_of([answer]))
        yield event(_answer(service, answer, "", finish, began))


async def fim(service: Service, call: Call) -> Any:
    """POST /v1/fim/completions, as Mistral's interface has it: a completion whose answer has the
    form of a chat's."""
    given = await complete(service, call)
    if isinstance(given, dict):
        choices = [_as_message(choice, "message") for choice in given["choices"]]
        return given | {"object": "chat.completion", "choices": choices}
    return _as_deltas(given)


def _as_message(choice: dict[str, Any], name: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": choice["text"]}
    return {"index": choice["index"], name: said, "finish_reason": choice["finish_reason"]}


async def _as_deltas(events: Any) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        async for each in events:
            data = each.removeprefix("data: ").strip()
            if data == "[DONE]":
                yield each
                continue
            chunk = json.loads(data)
            choices = [_as_message(choice, "delta") for choice in chunk["choices"]]
            yield event(chunk | {"object": "chat.completion.chunk", "choices": choices})
