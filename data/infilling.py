"""Fill-in-the-middle: documents whose middle stands behind their end, so that a model learns to
write what lies between two texts (Bavarian et al. 2022, arXiv:2207.14255).

A document that is drawn is split at two of its characters' borders, and written as prefix, suffix,
middle, a token before each (PSM); tokens are made of each of the three by itself.
"""

import numpy as np
from tokenizers import Tokenizer

from data.corpora import name_hash
from data.tokenizers.infilling import MARKS

OWN_MARKS = MARKS[1]
"""Of tokenizers that are trained here for it."""


def is_drawn(name: str, rate: float) -> bool:
    """Whether the document of this name is one of those that are split."""
    return name_hash(f"infill {name}") < rate


def infilled(
    text: str, name: str, tokenizer: Tokenizer, marks: tuple[int, int, int], end_of_text: int
) -> list[int]:
    """The document's tokens with its middle last; where it is split its name decides."""
    places = sorted(int(name_hash(f"{side} {name}") * (len(text) + 1)) for side in ("one", "other"))
    begin, end = places
    pieces = (text[:begin], text[end:], text[begin:end])
    ids = [end_of_text]
    for mark, encoding in zip(marks, tokenizer.encode_batch_fast(list(pieces)), strict=True):
        ids += [mark, *encoding.ids]
    return ids


def restored(ids: np.ndarray, tokenizer: Tokenizer, marks: tuple[int, int, int]) -> str:
    """The text of a document, whether it was split or not."""
    found = [int(np.flatnonzero(ids == mark)[0]) for mark in marks if (ids == mark).any()]

    def text(part: np.ndarray) -> str:
        return tokenizer.decode(part.tolist(), skip_special_tokens=False)

    if len(found) != len(marks):
        return text(ids[1:])
    prefix, suffix, middle = found
    return text(ids[prefix + 1 : suffix]) + text(ids[middle + 1 :]) + text(ids[suffix + 1 : middle])
