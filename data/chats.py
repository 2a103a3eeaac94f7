"""Chats as tokens: what the model's chat template writes, and which tokens the loss counts.

They are those of the assistant's turns, up to the token that ends the turn: what the model has to
say by itself after the template's generation prompt.
"""

from typing import Any, NamedTuple

import numpy as np

from configs.checks import UserError, require, require_text
from data.tokenizers.chat import Messages, render
from data.tokenizers.public_tokenizer import PublicTokenizer

ASSISTANT = "assistant"


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """First character of each of the assistant's turns, after the generation prompt, and the one
    after its last."""


def render_chat(messages: Any, tokenizer: PublicTokenizer, where: str) -> RenderedChat:
    """The conversation in the tokenizer's chat template.

    A turn is what the template adds to the conversation before it, with the prompt for an answer.

    Args:
      messages: {"role": ..., "content": text} each.
      where: the file and the line, for an error's sentence.
    Raises:
      UserError: no messages, none of the assistant's or an empty one; a template that has no
        generation prompt, or writes earlier turns otherwise when later ones follow.
    """
    checked = _checked(messages, where)
    require(
        tokenizer.chat_template is not None,
        "data.form='chat' or 'preference' needs a chat template, and data.tokenizer has none: name "
        "the tokenizer of a model that was trained to chat",
    )

    def written(count: int, prompt: bool = False) -> str:
        try:
            return render(
                checked[:count],
                tokenizer.chat_template or "",
                bos=tokenizer.text_of(tokenizer.bos_id),
                eos=tokenizer.text_of(tokenizer.eos_id),
                add_generation_prompt=prompt,
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    text = written(len(checked))
    spans = []
    for i, message in enumerate(checked):
        if message["role"] != ASSISTANT:
            continue
        begin, end = written(i, prompt=True), written(i + 1)
        content = str(message["content"]).strip()
        is_prompted = begin != written(i) or end[len(begin) :].lstrip().startswith(content[:20])
        require(
            is_prompted,
            f"{where}: the chat template has no generation prompt, so where an answer begins is "
            "not known: use a template that reads add_generation_prompt",
        )
        require(
            end.startswith(begin) and text.startswith(end),
            f"{where}: the chat template writes turn {i + 1} otherwise when others follow it: "
            "split the conversation, so that it ends with this turn",
        )
        spans.append((len(begin), len(end)))
    return RenderedChat(text, spans)


def _checked(messages: Any, where: str) -> Messages:
    require(
        isinstance(messages, list) and bool(messages),
        f"{where} has {messages!r:.40}, expected a list of messages: name their field with "
        "--data.text-field",
    )
    for i, message in enumerate(messages, start=1):
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        require(
            is_message and isinstance(message.get("content"), str),
            f"{where} message {i} is {message!r:.60}, expected a role and a content of text",
        )
        require(
            message["role"] != ASSISTANT or bool(message["content"].strip()),
            f"{where} message {i} is an empty turn of the assistant: remove it or the chat",
        )
        require_text(message["content"], f"{where} message {i}")
    require(
        any(message["role"] == ASSISTANT for message in messages),
        f"{where} has no turn of the assistant to learn from: remove the chat",
    )
    return messages


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
