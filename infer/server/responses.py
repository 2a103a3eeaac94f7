"""POST /v1/responses: OpenAI's newer interface over the same chat, its streamed events included."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from infer.server.bodies import validated
from infer.server.chat import FRAGMENT, ChatPiece, chat_pieces
from infer.server.chat_plan import ChatPlan, plan_chat
from infer.server.errors import invalid
from infer.server.schemas import ChatBody
from infer.server.schemas_responses import InputItem, ResponsesBody
from infer.server.service import Answer, Call, Service, event, new_id, usage_of
from infer.server.tool_calls import ToolCall


async def responses(service: Service, call: Call) -> Any:
    """Answers a conversation."""
    body: ResponsesBody = call.body
    plan = await plan_chat(service.model, _chat_body(body))
    events = _events(service, call, plan)
    if body.stream:
        return _written(events)
    last: dict[str, Any] = {}
    async for each in events:
        last = each
    return last["response"]


async def _written(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    number = 0
    async for each in events:
        yield event(each | {"sequence_number": number}, each["type"])
        number += 1


def _chat_body(body: ResponsesBody) -> ChatBody:
    """The conversation in the chat's form."""
    made: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if body.tools:
        made["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is not None and not isinstance(choice, str):
        choice = {"type": "function", "function": {"name": choice.name}}
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema":
        made["response_format"] = {
            "type": "json_schema",
            "json_schema": {"schema": form.schema_ or {}},
        }
    elif form is not None:
        made["response_format"] = {"type": form.type}
    return validated(
        ChatBody,
        made
        | {
            "tool_choice": choice,
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "seed": body.seed,
            "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
            "expert_preference": body.expert_preference,
        },
    )


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if body.instructions:
        made.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        _take_item(made, item, f"input.{i}")
    return made


def _take_item(made: list[dict[str, Any]], item: InputItem, param: str) -> None:
    """Adds an item to the messages; calls one after the other are one message's."""
    if item.type == "message":
        content = item.content
        parts = content if isinstance(content, str) else [p.model_dump() for p in content or ()]
        made.append({"role": item.role or "user", "content": parts})
    elif item.type == "function_call":
        function = {"name": item.name or "", "arguments": item.arguments or "{}"}
        call = {"id": item.call_id, "function": function}
        if made and made[-1].get("tool_calls"):
            made[-1]["tool_calls"].append(call)
        else:
            made.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif item.type == "function_call_output":
        output = item.output
        text = output if isinstance(output, str) else "".join(p.text or "" for p in output or ())
        made.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    elif item.type != "reasoning":
        raise invalid(f"{param}: an item of type {item.type[:100]!r} can't be read here", "input")


@dataclass
class _Items:
    """The output's items; the newest one may be open."""

    done: list[dict[str, Any]] = field(default_factory=list)
    kind: str = ""
    id: str = ""
    text: str = ""

    def add(self, kind: str, text: str) -> list[dict[str, Any]]:
        """Events of text for the open item of this kind, or for a new one."""
        events = [] if self.kind == kind else [*self.close(), *self._open(kind)]
        self.text += text
        name = "output_text" if kind == "message" else "reasoning_text"
        delta = self._at(f"response.{name}.delta") | {"content_index": 0, "delta": text}
        return [*events, delta | ({"logprobs": []} if kind == "message" else {})]

    def _open(self, kind: str) -> list[dict[str, Any]]:
        self.kind, self.text = kind, ""
        self.id = new_id("msg_" if kind == "message" else "rs_")
        item = self._item("in_progress", [])
        return [
            self._output("response.output_item.added", item),
            self._part("response.content_part.added", ""),
        ]

    def close(self) -> list[dict[str, Any]]:
        """Events of the end of the open item."""
        if not self.kind:
            return []
        name = "output_text" if self.kind == "message" else "reasoning_text"
        done = self._at(f"response.{name}.done") | {"content_index": 0, "text": self.text}
        done |= {"logprobs": []} if self.kind == "message" else {}
        part = self._part("response.content_part.done", self.text)
        item = self._item("completed", [part["part"]])
        events = [done, part, self._output("response.output_item.done", item)]
        self.done.append(item)
        self.kind = ""
        return events

    def call(self, call: ToolCall) -> list[dict[str, Any]]:
        """Events of a call of a function."""
        events = self.close()
        self.id = new_id("fc_")
        item = {"type": "function_call", "id": self.id, "call_id": call.id, "name": call.name}
        begun = item | {"arguments": "", "status": "in_progress"}
        whole = item | {"arguments": call.arguments, "status": "completed"}
        name = "response.function_call_arguments"
        parts = [call.arguments[i : i + FRAGMENT] for i in range(0, len(call.arguments), FRAGMENT)]
        events.append(self._output("response.output_item.added", begun))
        events += [self._at(f"{name}.delta") | {"delta": part} for part in parts]
        events.append(self._at(f"{name}.done") | {"arguments": call.arguments, "name": call.name})
        events.append(self._output("response.output_item.done", whole))
        self.done.append(whole)
        return events

    def _at(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "item_id": self.id, "output_index": len(self.done)}

    def _output(self, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self.done), "item": item}

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "reasoning_text", "text": text}
        if self.kind == "message":
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return self._at(kind) | {"content_index": 0, "part": part}

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        made: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        made["content"] = content
        return made | ({"role": "assistant"} if self.kind == "message" else {"summary": []})


async def _events(service: Service, call: Call, plan: ChatPlan) -> AsyncIterator[dict[str, Any]]:
    """The last one has the whole response."""
    response = _response(service, call.body)
    items, finish = _Items(), "length"
    async with service.answers([plan.text], plan.requests) as (answer,):
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}
        async for piece in chat_pieces(answer, plan.tool_names):
            finish = piece.finish or finish
            for each in _of_piece(items, piece):
                yield each
        for each in items.close():
            yield each
        is_cut = finish == "length"
        response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": items.done,
            "usage": _usage(answer),
        }
    call.count(usage_of([answer]))
    yield {"type": f"response.{response['status']}", "response": response}


def _of_piece(items: _Items, piece: ChatPiece) -> list[dict[str, Any]]:
    events = items.add("reasoning", piece.reasoning) if piece.reasoning else []
    events += items.add("message", piece.text) if piece.text else []
    for made in piece.calls:
        events += items.call(made)
    return events


def _usage(answer: Answer) -> dict[str, Any]:
    usage = usage_of([answer])
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _response(service: Service, body: ResponsesBody) -> dict[str, Any]:
    tools = [tool.model_dump() for tool in body.tools or ()]
    choice = body.tool_choice
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": service.model.name,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        "tools": tools,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }
