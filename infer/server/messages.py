"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface over the same chat."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from infer.server.bodies import validated
from infer.server.chat import FRAGMENT, ChatReply, chat_pieces
from infer.server.chat_plan import ChatPlan, plan_chat
from infer.server.errors import invalid
from infer.server.schemas import ChatBody
from infer.server.schemas_messages import AnthropicMessage, Block, CountTokensBody, MessagesBody
from infer.server.service import Answer, Call, Service, event, new_id, usage_of
from infer.server.tool_calls import ToolCall

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def messages(service: Service, call: Call) -> Any:
    """Answers a conversation."""
    body: MessagesBody = call.body
    plan = await plan_chat(service.model, _chat_body(body))
    if body.stream:
        return _events(service, call, plan)
    reply = ChatReply()
    async with service.answers([plan.text], plan.requests) as (answer,):
        async for piece in chat_pieces(answer, plan.tool_names):
            reply.add(piece)
        call.count(usage_of([answer]))
        content: list[dict[str, Any]] = []
        if reply.reasoning:
            content.append(_thinking(reply.reasoning))
        if reply.text:
            content.append({"type": "text", "text": reply.text})
        content += [_tool_use(each) for each in reply.calls]
        return _message(service, answer, content) | _ending(answer, reply.finish)


async def count_tokens(service: Service, call: Call) -> Any:
    """Tokens that the conversation has as the model would read it."""
    body: CountTokensBody = call.body
    plan = await plan_chat(service.model, _chat_body(body))
    return {"input_tokens": len(plan.text.prompt)}


def _chat_body(body: CountTokensBody) -> ChatBody:
    """The conversation in the chat's form."""
    made: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if body.tools:
        made["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                },
            }
            for tool in body.tools
        ]
    if body.tool_choice is not None:
        choice, name = body.tool_choice.type, body.tool_choice.name
        if choice == "tool" and name is None:
            raise invalid("tool_choice of type tool needs a name", "tool_choice")
        named = {"type": "function", "function": {"name": name}}
        made["tool_choice"] = CHOICES.get(choice, named)
    if body.thinking is not None and body.thinking.type != "adaptive":
        made["thinking"] = {"type": body.thinking.type}
    config = body.output_config
    if config is not None and config.format is not None:
        made["response_format"] = {
            "type": "json_schema",
            "json_schema": {"schema": config.format.schema_},
        }
    if isinstance(body, MessagesBody):
        made |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "expert_preference": body.expert_preference,
        }
    return validated(ChatBody, made)


def _messages(body: CountTokensBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if body.system:
        made.append({"role": "system", "content": _text(body.system, "system")})
    for i, message in enumerate(body.messages):
        made += _of_message(message, f"messages.{i}")
    if made and made[-1]["role"] == "assistant" and "tool_calls" not in made[-1]:
        made[-1]["prefix"] = True  # the answer goes on from it
    return made


def _of_message(message: AnthropicMessage, param: str) -> list[dict[str, Any]]:
    """Results of functions are messages of their own in the chat's form."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _text(block.content or "", param),
        }
        for block in message.content
        if block.type == "tool_result"
    ]
    rest = [b for b in message.content if b.type not in ("tool_result", "redacted_thinking")]
    said: dict[str, Any] = {"role": message.role}
    said["content"] = _text([b for b in rest if b.type not in ("tool_use", "thinking")], param)
    thought = "".join(b.thinking or "" for b in rest if b.type == "thinking")
    if thought:
        said["reasoning_content"] = thought
    calls = [
        {"id": b.id, "function": {"name": b.name or "", "arguments": b.input or {}}}
        for b in rest
        if b.type == "tool_use"
    ]
    if calls:
        said["tool_calls"] = calls
    return [*results, *([said] if rest else [])]


def _text(content: str | Sequence[Block], param: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            kind = block.type[:100]
            raise invalid(f"{param}: a block of type {kind!r} can't be read: this model reads text")
    return "".join(block.text or "" for block in content)


def _message(service: Service, answer: Answer, content: list[dict[str, Any]]) -> dict[str, Any]:
    usage = usage_of([answer])
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": service.model.name,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        },
    }


def _ending(answer: Answer, finish: str) -> dict[str, Any]:
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(finish, "end_turn")
    if answer.stopped_by is not None and reason == "end_turn":
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.stopped_by}


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    name, value = call.name, json.loads(call.arguments)
    return {"type": "tool_use", "id": call.id, "name": name, "input": value}


class _Blocks:
    """Events of the blocks of an answer: one is open at a time."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def delta(self, kind: str, text: str) -> list[str]:
        """Text for the open block of this kind, or for a new one."""
        field = "thinking" if kind == "thinking" else "text"
        block = _thinking("") if kind == "thinking" else {"type": "text", "text": ""}
        opened = [] if self._kind == kind else self.open(kind, block)
        return [*opened, self._delta({"type": f"{field}_delta", field: text})]

    def call(self, call: ToolCall) -> list[str]:
        opened = self.open("tool_use", _tool_use(call) | {"input": {}})
        parts = [call.arguments[i : i + FRAGMENT] for i in range(0, len(call.arguments), FRAGMENT)]
        deltas = [self._delta({"type": "input_json_delta", "partial_json": x}) for x in parts]
        return [*opened, *deltas, *self.close()]

    def open(self, kind: str, block: dict[str, Any]) -> list[str]:
        closed = self.close()
        self._index, self._kind = self._index + 1, kind
        return [*closed, self._event("content_block_start", content_block=block)]

    def close(self) -> list[str]:
        if not self._kind:
            return []
        self._kind = ""
        return [self._event("content_block_stop")]

    def _delta(self, delta: dict[str, Any]) -> str:
        return self._event("content_block_delta", delta=delta)

    def _event(self, name: str, **fields: Any) -> str:
        return event({"type": name, "index": self._index} | fields, name)


async def _events(service: Service, call: Call, plan: ChatPlan) -> AsyncIterator[str]:
    blocks, finish = _Blocks(), "length"
    async with service.answers([plan.text], plan.requests) as (answer,):
        has_begun = False
        async for piece in chat_pieces(answer, plan.tool_names):
            if not has_begun:  # with the first tokens it is known what the cache had
                has_begun = True
                start = _message(service, answer, [])
                yield event({"type": "message_start", "message": start}, "message_start")
            if piece.reasoning:
                for each in blocks.delta("thinking", piece.reasoning):
                    yield each
            if piece.text:
                for each in blocks.delta("text", piece.text):
                    yield each
            for made in piece.calls:
                for each in blocks.call(made):
                    yield each
            finish = piece.finish or finish
        for each in blocks.close():
            yield each
        usage = usage_of([answer])
        delta = {"type": "message_delta", "delta": _ending(answer, finish)}
        delta["usage"] = {"output_tokens": usage.completion_tokens}
    call.count(usage)
    yield event(delta, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")
