"""Items of a source as tokens: texts, chats, and ids that are tokens already."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs.checks import require
from configs.data import DataConfig
from data.chats import loss_mask, render_chat
from data.held_out import token_bytes
from data.preferences import encode_pair
from data.sources import Item, Unit
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import num_ids


class Encoded(NamedTuple):
    ids: Sequence[int] | np.ndarray
    """As they lie in a token file."""
    num_bytes: int
    """Of the text, UTF-8."""
    mask: np.ndarray | None = None
    """Of chats and pairs, uint8 for each token: 1 where the loss counts it."""


Encode = Callable[[Unit, list[Item]], list[Encoded | None]]
"""A batch of items; None of an empty one."""


def encoder_of(
    data: DataConfig, tokenizer: Tokenizer, public: PublicTokenizer | None, end_of_text: int
) -> Encode:
    """How the items of a corpus become tokens.

    Args:
      end_of_text: token that begins a document of text.
    """

    if data.form != "text":
        assert public is not None, "the config demands one"
        if data.form == "chat":
            return partial(_encode_chats, public, data.answers)
        return partial(_encode_pairs, public)

    def encode(unit: Unit, items: list[Item]) -> list[Encoded | None]:
        texts = [item.text or "" for item in items]
        encodings = tokenizer.encode_batch_fast(texts) if any(texts) else []
        made: list[Encoded | None] = []
        for i, (item, text) in enumerate(zip(items, texts, strict=True)):
            if item.ids is not None:
                made.append(of_ids(unit, item))
            elif text:
                made.append(Encoded([end_of_text, *encodings[i].ids], len(text.encode())))
            else:
                made.append(None)
        return made

    known = num_ids(tokenizer)
    bytes_V = token_bytes(tokenizer, known)

    def of_ids(unit: Unit, item: Item) -> Encoded | None:
        assert item.ids is not None
        ids = np.asarray(item.ids)
        if not len(ids):
            return None
        require(
            int(ids.min()) >= 0 and int(ids.max()) < known,
            f"{unit.where} {item.number} has the token {int(ids.max())}, the tokenizer "
            f"{data.tokenizer!r} has {known}: name the one that the file was made with",
        )
        if bytes_V is None:
            num_bytes = len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
        else:
            num_bytes = int(bytes_V[ids].sum())
        return Encoded(np.concatenate([[end_of_text], ids]), num_bytes)

    return encode


def _encode_pairs(
    tokenizer: PublicTokenizer, unit: Unit, items: list[Item]
) -> list[Encoded | None]:
    made: list[Encoded | None] = []
    for item in items:
        where = f"{unit.where} {item.number}"
        ids, mask, num_bytes = encode_pair(item.messages, tokenizer, where, item.tools)
        made.append(Encoded(ids, num_bytes, mask))
    return made


def _encode_chats(
    tokenizer: PublicTokenizer, answers: Literal["each", "last"], unit: Unit, items: list[Item]
) -> list[Encoded | None]:
    chats = []
    for item in items:
        where = f"{unit.where} {item.number}"
        made = render_chat(item.messages, tokenizer, where, tools=item.tools, answers=answers)
        chats.append(made)
    encodings = tokenizer.encode_rendered([chat.text for chat in chats])
    encoded: list[Encoded | None] = []
    for chat, encoding in zip(chats, encodings, strict=True):
        mask = loss_mask(encoding.ids, encoding.offsets, chat.spans, tokenizer.eos_ids)
        encoded.append(Encoded(encoding.ids, len(chat.text.encode()), mask))
    return encoded
