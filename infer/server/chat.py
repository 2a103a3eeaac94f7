"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer.engine import TokenLogprobs
from infer.server.chat_plan import ChatPlan, plan_chat
from infer.server.schemas import ChatBody
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
from infer.server.token_texts import TokenTexts
from infer.server.tool_calls import ToolCall, ToolText

FRAGMENT = 24
"""Characters of a call's arguments in one event of a stream."""


@dataclass(frozen=True)
class ChatPiece:
    """What an answer in a chat says next."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    """stop, length or tool_calls with the last piece."""


@dataclass
class ChatReply:
    """A whole answer in a chat."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str = "length"
    reasoning_pieces: int = 0
    """Pieces that thought: a token each, where the engine gives them one by one."""

    def add(self, piece: ChatPiece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.calls += piece.calls
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish
        self.reasoning_pieces += bool(piece.reasoning)


async def chat_pieces(answer: Answer, tool_names: Sequence[str]) -> AsyncIterator[ChatPiece]:
    """An answer piece by piece, calls of these functions told apart from its text."""
    tools = ToolText(tool_names) if tool_names else None
    async for piece in answer.pieces():
        text, calls, finish = piece.text, [], piece.finish
        if tools is not None:
            text, calls = tools.add(text)
            if finish is not None:
                rest, more = tools.finish()
                text, calls = text + rest, calls + more
                finish = "tool_calls" if tools.num_calls and finish == "stop" else finish
        yield ChatPiece(text, piece.reasoning, tuple(calls), piece.logprobs, finish)


async def chat(service: Service, call: Call) -> Any:
    """Answers a conversation, n times."""
    body: ChatBody = call.body
    plan = await plan_chat(service.model, body)
    common = {
        "id": new_id("chatcmpl-"),
        "created": int(time.time()),
        "model": service.model.name,
        "system_fingerprint": f"{service.model.name}-{service.model.version}",
    }
    if body.stream:
        return _events(service, call, plan, common)
    async with service.answers([plan.text], plan.requests) as answers:
        replies = [ChatReply() for _ in answers]
        sources = [chat_pieces(answer, plan.tool_names) for answer in answers]
        async for i, piece in merged(sources):
            replies[i].add(piece)
        usage = usage_of(answers, sum(reply.reasoning_pieces for reply in replies))
    call.count(usage)
    choices = [
        with_experts(_choice(service, body, i, reply), answer) | {"stop_reason": answer.stopped_by}
        for i, (reply, answer) in enumerate(zip(replies, answers, strict=True))
    ]
    return common | {"object": "chat.completion", "choices": choices, "usage": usage.openai()}


def _choice(service: Service, body: ChatBody, index: int, reply: ChatReply) -> dict[str, Any]:
    content = reply.text if reply.text or not reply.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        message |= {"reasoning": reply.reasoning, "reasoning_content": reply.reasoning}
    if reply.calls:
        message["tool_calls"] = [_call(each) for each in reply.calls]
    logprobs = chat_logprobs(service.model.texts, reply.logprobs) if body.logprobs else None
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reply.finish,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The form of the chat's interface."""

    def written(token: int, logprob: float) -> dict[str, Any]:
        raw = list(texts.bytes_of(token))
        return {"token": texts.text_of(token), "logprob": logprob, "bytes": raw}

    content = [
        written(x.token, x.logprob) | {"top_logprobs": [written(*pair) for pair in x.top]}
        for x in entries
    ]
    return {"content": content, "refusal": None}


async def _events(
    service: Service, call: Call, plan: ChatPlan, common: dict[str, Any]
) -> AsyncIterator[str]:
    body: ChatBody = call.body
    common |= {"object": "chat.completion.chunk"}
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    if include_usage:
        common["usage"] = None

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs=None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        choice = with_experts(choice, answers[index]) if finish is not None else choice
        return event(common | {"choices": [choice]})

    async with service.answers([plan.text], plan.requests) as answers:
        num_calls, thought = [0] * len(answers), 0
        for i in range(len(answers)):
            yield chunk(i, {"role": "assistant", "content": ""})
        sources = [chat_pieces(answer, plan.tool_names) for answer in answers]
        async for i, piece in merged(sources):
            thought += bool(piece.reasoning)
            if piece.reasoning:
                said = {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}
                yield chunk(i, said)
            logprobs = None
            if body.logprobs and piece.logprobs:
                logprobs = chat_logprobs(service.model.texts, piece.logprobs)
            if piece.text or logprobs:
                yield chunk(i, {"content": piece.text}, None, logprobs)
            for each in piece.calls:
                for delta in call_deltas(each, num_calls[i]):
                    yield chunk(i, {"tool_calls": [delta]})
                num_calls[i] += 1
            if piece.finish is not None:
                yield chunk(i, {}, piece.finish)
        usage = usage_of(answers, thought)
    call.count(usage)
    if include_usage:
        yield event(common | {"choices": [], "usage": usage.openai()})
    yield event("[DONE]")


def call_deltas(call: ToolCall, index: int) -> list[dict[str, Any]]:
    """A call in fragments: its id and name once, then its arguments."""
    named = {"name": call.name, "arguments": ""}
    first = {"index": index, "id": call.id, "type": "function", "function": named}
    parts = [call.arguments[i : i + FRAGMENT] for i in range(0, len(call.arguments), FRAGMENT)]
    return [first, *({"index": index, "function": {"arguments": part}} for part in parts)]
