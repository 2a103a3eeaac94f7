"""Conversations as token lists, in the chat template that the model was trained with."""

from typing import Any

from configs.checks import require
from data.tokenizers.chat import Messages, render
from data.tokenizers.public_tokenizer import PublicTokenizer


def chat_ids(
    tokenizer: PublicTokenizer,
    messages: Messages,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """The conversation's tokens, up to where the model's answer begins.

    Args:
      messages: {"role": "system" | "user" | "assistant", "content": text} each.
      tools: JSON schemas of functions that the model may call.
      variables: further ones that the template knows ("enable_thinking").
    Raises:
      UserError: the model has no chat template, or it can't be rendered.
    """
    require(
        tokenizer.chat_template is not None,
        "this model has no chat template: give it a plain prompt, or name one that was trained to "
        "chat",
    )
    text = render(
        messages,
        tokenizer.chat_template or "",
        bos=tokenizer.text_of(tokenizer.bos_id),
        eos=tokenizer.text_of(tokenizer.eos_id),
        tools=tools,
        variables=variables,
    )
    return tokenizer.encode(text, specials=True, bos=False)


def fitting(
    tokenizer: PublicTokenizer, messages: Messages, room: int
) -> tuple[list[int], Messages]:
    """The conversation's tokens, at most `room`, and the messages that are left of it: its oldest
    exchanges go first.

    Raises:
      UserError: the newest message does not fit even without them, or as chat_ids.
    """
    while len(ids := chat_ids(tokenizer, messages)) > room:
        shorter = without_oldest(messages)
        require(
            bool(shorter) and shorter[-1]["role"] == "user",
            f"the message makes {len(ids)} tokens, at most {room} fit beside an answer: shorten it",
        )
        messages = shorter
    return ids, messages


def without_oldest(messages: Messages) -> Messages:
    """The conversation less its oldest exchange; what the system was told stays."""
    first = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:first], *messages[first + 2 :]]
