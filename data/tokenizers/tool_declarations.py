"""How a model is told of functions, and how its calls are written in a conversation."""

import json
from collections.abc import Mapping
from typing import Any

from data.tokenizers.chat import Messages

Tools = list[dict[str, Any]]
"""JSON schemas of functions."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def knows_tools(template: str | None) -> bool:
    """Whether a chat template writes declarations of functions itself."""
    return template is not None and "tools" in template


def as_template_takes(
    messages: Messages, tools: Tools | None, template: str | None
) -> tuple[Messages, Tools | None]:
    """The conversation and the functions as the template can write them, without functions where
    the messages declare them."""
    if knows_tools(template) or not (tools or any("tool_calls" in m for m in messages)):
        return messages, tools
    return _with_declarations(messages, tools or []), None


def parsed_arguments(arguments: Any) -> Any:
    """A call's arguments as templates write them, an object; text that is none stays what it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments, parse_constant=str)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_declarations(messages: Messages, tools: Tools) -> Messages:
    """The conversation for a template that does not know functions: they are declared to the
    system, calls are the assistant's text, and what they gave is the user's."""
    declared = "\n".join(json.dumps(tool["function"]) for tool in tools)
    told = (
        "You may call functions. To call one, answer with nothing but\n"
        f'{OPEN}\n{{"name": NAME, "arguments": {{...}}}}\n{CLOSE}\n'
        f"The functions, as JSON schemas:\n{declared}"
    )
    plain = [_plain(message) for message in messages]
    if plain and plain[0]["role"] == "system":
        first = {"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    for call in message.get("tool_calls") or ():
        content += f"\n{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}"
    return {"role": message["role"], "content": content.lstrip("\n")}
