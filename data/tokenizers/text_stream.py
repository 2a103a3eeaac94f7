"""Text of tokens that come one by one, at a cost that does not grow with the text.

A token has no text of its own: the space before a word belongs to what stands before it
(SentencePiece tokenizers drop the one that begins a text), and a character may take several
tokens. So the newest tokens are decoded together with those just before them, and what that adds is
the new text.
"""

from collections.abc import Sequence

from data.tokenizers.public_tokenizer import PublicTokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Text that a decoder gives for bytes that are no character, or not yet one."""


class TextStream:
    """The text that follows a prompt: what is added and finished, put together, is the text of all
    tokens without the prompt's."""

    def __init__(self, tokenizer: PublicTokenizer, prompt: Sequence[int] = ()) -> None:
        """
        Args:
          prompt: token ids before the text; empty where it stands by itself.
        """
        self._tokenizer = tokenizer
        self._before = list(prompt)
        """Tokens whose text was given, as many as the next ones need to be decoded with."""
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """Text that the next tokens add; a character whose bytes are incomplete waits."""
        self._waiting.extend(ids)
        text = self._new_text()
        return "" if text.endswith(UNFINISHED) else self._given(text)

    def finish(self) -> str:
        """Text that still waits, its last character incomplete."""
        return self._given(self._new_text())

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(known) :]

    def _given(self, text: str) -> str:
        """Tokens without text (special ones) can't stand before others: they wait on."""
        if text:
            self._before, self._waiting = self._waiting, []
        return text
