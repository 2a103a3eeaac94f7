"""Bytes and text of single tokens, for log-probabilities."""

import functools
from dataclasses import dataclass, field

from llguidance import LLTokenizer

from configs.checks import UserError
from data.tokenizers.public_tokenizer import PublicTokenizer


@dataclass(eq=False)
class TokenTexts:
    """What each token of a vocabulary stands for."""

    tokenizer: PublicTokenizer
    vocab_size: int
    """Of the model, which may have ids without a token."""
    _known: dict[int, bytes] = field(default_factory=dict)

    def bytes_of(self, token: int) -> bytes:
        """Empty where the id has no token."""
        if token not in self._known:
            self._known[token] = bytes(self.guide.decode_bytes([token]))
        return self._known[token]

    def text_of(self, token: int) -> str:
        r"""Its text; of bytes that are no whole characters "bytes:\xe2\x80", as OpenAI writes it,
        so that two tokens seldom have one text."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @functools.cached_property
    def guide(self) -> LLTokenizer:
        """The vocabulary as grammars need it; made once, in a fraction of a second.

        Raises:
          UserError: a tokenizer that it can't follow.
        """
        ends = sorted(self.tokenizer.eos_ids)
        try:
            return LLTokenizer(
                self.tokenizer.tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=ends or None
            )
        except ValueError as error:
            raise UserError(
                f"this model's tokenizer can't be followed by grammars: {error}"
            ) from error
