"""Texts that end a generation, wherever tokens cut them."""

from collections.abc import Callable, Sequence

from data.tokenizers.public_tokenizer import PublicTokenizer

LONGEST_TOKEN = 64
"""Characters that a token adds at most, more or less: so far back a stop text is looked for."""


def stops_at(
    tokenizer: PublicTokenizer, texts: Sequence[str]
) -> Callable[[list[int]], bool] | None:
    """Whether a text, given as its tokens so far, holds one of these; None where there are none.

    The last tokens alone are decoded: as many as the longest of the texts may have, and some before
    them.
    """
    if not texts:
        return None
    longest = max(map(len, texts)) + LONGEST_TOKEN

    def is_stopped(tokens: list[int]) -> bool:
        end = tokenizer.decode(tokens[-longest:])
        return any(text in end for text in texts)

    return is_stopped
