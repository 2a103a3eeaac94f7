"""Chats as tokens: what the model's chat template writes, and which tokens the loss counts.

They are those of the assistant's turns, up to the token that ends the turn: what the model has to
say by itself after the template's generation prompt.
"""

import json
from typing import Any, Literal, NamedTuple

import numpy as np

from configs.checks import UserError, require, require_text
from data.tokenizers.chat import Messages, render
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tool_declarations import Tools, as_template_takes, parsed_arguments

ASSISTANT = "assistant"
PROBE = "answer"
"""A turn's content by which a template shows whether anything stands before it."""


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """First character of each of the assistant's turns, after the generation prompt, and the one
    after its last."""


def render_chat(
    messages: Any,
    tokenizer: PublicTokenizer,
    where: str,
    *,
    tools: Any = None,
    answers: Literal["each", "last"] = "each",
) -> RenderedChat:
    """The conversation in the tokenizer's chat template.

    A turn is what the template adds to the conversation before it, with the prompt for an answer.

    Args:
      messages: {"role": ..., "content": text} each; the assistant's may have "tool_calls", which
        stand in for a content.
      where: the file and the line, for an error's sentence.
      tools: JSON schemas of functions, a list or its JSON; a template that has no place for them
        gets them in the system's message, as models are served (data/tokenizers).
      answers: the assistant's turns whose spans are wanted.
    Raises:
      UserError: no messages, none of the assistant's or an empty one; a template that has no
        generation prompt, or writes earlier turns otherwise when later ones follow.
    """
    checked, functions = _checked(messages, where), _checked_tools(tools, where)
    template = tokenizer.chat_template
    require(
        template is not None,
        "data.form='chat' or 'preference' needs a chat template, and data.tokenizer has none: name "
        "the tokenizer of a model that was trained to chat",
    )
    assert template is not None
    plain, functions = as_template_takes(checked, functions, template)
    told = len(plain) - len(checked)  # a system's message of the functions

    def written(first: Messages, prompt: bool = False) -> str:
        try:
            return render(
                first,
                template,
                bos=tokenizer.text_of(tokenizer.bos_id),
                eos=tokenizer.text_of(tokenizer.eos_id),
                add_generation_prompt=prompt,
                tools=functions,
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    text, spans = written(plain), []
    turns = [i for i, message in enumerate(plain) if message["role"] == ASSISTANT]
    for i in turns if answers == "each" else turns[-1:]:
        before, begin, end = plain[:i], written(plain[:i], prompt=True), written(plain[: i + 1])
        content = str(plain[i]["content"]).strip()
        probed = end if content else written([*before, {"role": ASSISTANT, "content": PROBE}])
        is_prompted = begin != written(before) or probed[len(begin) :].lstrip().startswith(
            content[:20] or PROBE
        )
        require(
            is_prompted,
            f"{where}: the chat template has no generation prompt, so where an answer begins is "
            "not known: use a template that reads add_generation_prompt",
        )
        require(
            end.startswith(begin) and text.startswith(end),
            f"{where}: the chat template writes turn {i + 1 - told} otherwise when others follow "
            "it: split the conversation, so that it ends with this turn, or of chats count the "
            "last turn alone (--data.answers last)",
        )
        missing = [x for x in _called(plain[i]) if x not in end[len(begin) :]]
        require(
            not missing,
            f"{where}: the chat template does not write the call of {', '.join(missing)} in turn "
            f"{i + 1 - told}: use the template of a model that calls functions",
        )
        spans.append((len(begin), len(end)))
    return RenderedChat(text, spans)


def _called(message: dict[str, Any]) -> list[str]:
    """Names of the functions that a turn calls."""
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def _checked(messages: Any, where: str) -> Messages:
    require(
        isinstance(messages, list) and bool(messages),
        f"{where} has {messages!r:.40}, expected a list of messages: name their field with "
        "--data.text-field",
    )
    made = []
    for i, message in enumerate(messages, start=1):
        here = f"{where} message {i}"
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        sentence = f"{here} is {message!r:.60}, expected a role and a content of text"
        require(is_message, sentence)
        # Of columns, each message has the fields of all.
        plain = {name: value for name, value in message.items() if value is not None}
        calls = _checked_calls(plain.pop("tool_calls", None), here)
        plain |= {"tool_calls": calls} if calls else {}
        if calls:
            plain.setdefault("content", "")
        require(isinstance(plain.get("content"), str), sentence)
        require(
            plain["role"] != ASSISTANT or bool(plain["content"].strip()) or bool(calls),
            f"{here} is an empty turn of the assistant: remove it or the chat",
        )
        require_text(plain["content"], here)
        made.append(plain)
    require(
        any(message["role"] == ASSISTANT for message in made),
        f"{where} has no turn of the assistant to learn from: remove the chat",
    )
    return made


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions, their arguments as objects."""
    made = []
    require(isinstance(calls, list | None), f"{where} has tool_calls {calls!r:.60}, not a list")
    for call in calls or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        require(
            isinstance(function, dict) and isinstance(function.get("name"), str),
            f"{where} has the tool call {call!r:.60}, expected a function with a name and "
            "arguments",
        )
        assert isinstance(function, dict)
        arguments = parsed_arguments(function.get("arguments"))
        own = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        made.append({**call, "type": "function", "function": own})
    return made


def _checked_tools(tools: Any, where: str) -> Tools | None:
    found: Any = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError):
            found = None if not tools.strip() else tools
    require(
        found is None
        or (isinstance(found, list) and all(isinstance(_declared(x), dict) for x in found)),
        f"{where} has the tools {tools!r:.60}, expected a list of functions with their names and "
        "parameters",
    )
    return [
        x if "function" in x else {"type": "function", "function": x} for x in found or ()
    ] or None


def _declared(tool: Any) -> Any:
    """A function's schema, of which some write the type beside it; None of anything else."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if is_named else None


def loss_mask(
    ids: list[int],
    offsets: list[tuple[int, int]],
    spans: list[tuple[int, int]],
    ends: frozenset[int],
) -> np.ndarray:
    """Whether the loss counts each token, uint8.

    A token counts where its characters begin inside a turn, up to the turn's last token that ends
    an answer, where there is one.

    Args:
      offsets: first character of each token, and the one after its last.
      ends: tokens that end an answer.
    """
    begins = np.array([begin for begin, _ in offsets])
    is_end = np.isin(ids, list(ends))
    mask = np.zeros(len(ids), np.uint8)
    for first, last in spans:
        inside = np.flatnonzero((begins >= first) & (begins < last))
        ending = inside[is_end[inside]]
        mask[inside if not len(ending) else inside[inside <= ending[-1]]] = 1
    return mask
