"""A conversation as the engine's prompt, and what it says of an answer's form."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.checks import UserError
from data.tokenizers.tool_declarations import (
    OPEN,
    as_template_takes,
    knows_tools,
    parsed_arguments,
)
from infer.chat import chat_ids
from infer.engine import Request
from infer.server.errors import invalid
from infer.server.plan import TextPlan, check_text, make_requests, room_for, stop_texts
from infer.server.reply_text import END_THINK, THINK, Thinking
from infer.server.schemas import ChatBody, ContentPart, Message, ToolChoice
from infer.server.served_model import ServedModel
from infer.server.structured import Wanted, tool_grammar, wanted_grammar

TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class ChatPlan:
    """How a conversation is to be answered."""

    text: TextPlan
    requests: list[Request]
    tool_names: tuple[str, ...]
    """Functions that the answer may call."""


async def plan_chat(model: ServedModel, body: ChatBody) -> ChatPlan:
    """
    Raises:
      ApiError: messages or settings that can't be followed.
    """
    model.check_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: set it to true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_tokens and max_completion_tokens say the same: leave one out")
    tools = _tools(body)
    variables = _variables(model, body)
    messages, begun = _messages(body.messages)
    ids = await asyncio.to_thread(_ids, model, messages, tools, variables)
    ids += model.tokenizer.encode(check_text(begun, "messages"), bos=False) if begun else []
    new = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    wanted = _wanted(model, body, tools)
    text = TextPlan(
        ids,
        room_for(model, ids, new, "messages"),
        stop_texts(body),
        stands_alone=True,
        thinking="never" if wanted is not None or begun else _thinking(model, ids, variables),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        wants_experts=body.return_routed_experts,
    )
    requests = await make_requests(model, body, [text], wanted)
    names = tuple(tool["function"]["name"] for tool in tools or ())
    return ChatPlan(text, requests, names)


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """Declarations of the functions that may be called; None: none may."""
    choice = body.tool_choice
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice asks for a function, and tools has none", "tool_choice")
        return None
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name", "tools")
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise invalid(
            f"tool_choice names {choice.function.name!r}, tools has {', '.join(names)}",
            "tool_choice",
        )
    return None if choice == "none" else tools


def _wanted(
    model: ServedModel, body: ChatBody, tools: list[dict[str, Any]] | None
) -> Wanted | None:
    wanted = wanted_grammar(body, body.response_format)
    choice = body.tool_choice
    if tools is None or choice in (None, "auto", "none"):
        return wanted
    if wanted is not None:
        raise invalid(f"{wanted.param} and a tool_choice can't go together: leave one out")
    name = choice.function.name if isinstance(choice, ToolChoice) else None
    is_tagged = OPEN in (model.tokenizer.chat_template or "") or not _knows(model)
    return Wanted(tool_grammar(tools, name, is_tagged=is_tagged), "tools")


def _knows(model: ServedModel) -> bool:
    return knows_tools(model.tokenizer.chat_template)


def _variables(model: ServedModel, body: ChatBody) -> dict[str, Any]:
    """What the template is told beside the messages."""
    variables = dict(body.chat_template_kwargs or {})
    template = model.tokenizer.chat_template or ""
    if body.thinking is not None:
        enabled = body.thinking.type == "enabled"
        if enabled and not model.thinks:
            raise invalid("this model does not think: leave thinking out", "thinking")
        variables |= {"enable_thinking": enabled, "thinking": enabled}
    if body.reasoning_effort is not None:
        effort = body.reasoning_effort
        if "reasoning_effort" not in template and effort not in ("none", "minimal"):
            raise invalid(
                "this model's template knows no reasoning_effort: leave it out", "reasoning_effort"
            )
        variables["reasoning_effort"] = effort
    unknown = [name for name in body.chat_template_kwargs or () if name not in template]
    if unknown:
        raise invalid(
            f"this model's template knows no {', '.join(unknown)}: leave it out of "
            "chat_template_kwargs",
            "chat_template_kwargs",
        )
    return variables


def _messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], str]:
    """The messages as templates take them, and how the answer begins, where the last one says."""
    made = [_message(message, f"messages.{i}") for i, message in enumerate(messages)]
    if any(message.prefix for message in messages[:-1]):
        raise invalid("messages: only the last one may be a prefix", "messages")
    if not messages[-1].prefix:
        return made, ""
    if messages[-1].role != "assistant":
        raise invalid("messages: a prefix must be the assistant's", "messages")
    return made[:-1], made[-1]["content"]


def _message(message: Message, param: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": _content(message.content, param)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": parsed_arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        made |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return made


def _content(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part.type == "refusal":
            continue
        if part.type not in TEXT_PARTS or part.text is None:
            raise invalid(
                f"{param}: a part of type {part.type[:100]!r} can't be read, this model reads text",
                "messages",
            )
        texts.append(part.text)
    return "".join(texts)


def _ids(
    model: ServedModel,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> list[int]:
    messages, tools = as_template_takes(messages, tools, model.tokenizer.chat_template)
    try:
        return chat_ids(model.tokenizer, messages, tools, variables)
    except UserError as error:
        raise invalid(str(error), "messages") from error
    except UnicodeEncodeError as error:
        raise invalid("messages hold text that is no UTF-8", "messages") from error


def _thinking(model: ServedModel, ids: list[int], variables: dict[str, Any]) -> Thinking:
    """Whether the answer may think; a template may have begun it, or have ended it already."""
    if not model.thinks:
        return "never"
    end = model.tokenizer.decode(ids[-8:], specials=True).rstrip()
    if end.endswith(THINK):
        return "begun"
    return "never" if end.endswith(END_THINK) else "maybe"
