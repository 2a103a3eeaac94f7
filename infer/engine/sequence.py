"""A request under way: tokens known, and tokens that the model has read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infer.engine.keys import next_key
from infer.engine.types import Request, TokenLogprobs


@dataclass(eq=False)
class TokenSequence:
    """A request, its text so far, and how much of both the state holds."""

    number: int
    request: Request
    width: int
    """Tokens of the programs that read its prompt: its own, so that the text depends on nobody."""
    root: bytes
    """The key of its prefix without tokens."""
    text: list[int] = field(default_factory=list)
    read: int = 0
    """Tokens that the state holds, of the prompt and then of the text."""
    row: int = -1
    """Of the state; -1 while it waits."""
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    """Pages that it found, and others may hold: the first ones."""
    num_kept: int = 0
    """Whole pages of it that are named."""
    cached_tokens: int | None = None
    """Of the prompt, found when it first had a row."""
    is_told: bool = False
    """Whether something of it was emitted."""
    scores: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    """Of the prompt's tokens, where asked."""
    experts: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """Where asked: the experts of tokens that were read, [T, N, K], and the place of the first."""
    served: int = 0
    """When a piece of its prompt was last read, in turns of all."""
    stops: set[int] = field(default_factory=set)
    """Where reading pauses: a state is kept there."""
    keys: list[bytes] = field(default_factory=list)

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def is_running(self) -> bool:
        return self.row >= 0

    @property
    def known(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt) + len(self.text)

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are to be read."""
        return max(len(self.prompt) - self.read, 0)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens of the prompt and then of the text."""
        size = len(self.prompt)
        later = self.text[max(begin - size, 0) : max(end - size, 0)]
        return [*self.prompt[begin:end], *later]

    def page_keys(self, count: int, page_size: int) -> list[bytes]:
        """Keys of its first `count` whole pages."""
        while len(self.keys) < count:
            begin = len(self.keys) * page_size
            parent = self.keys[-1] if self.keys else self.root
            of_prompt = min(max(len(self.prompt) - begin, 0), page_size)
            self.keys.append(next_key(parent, self.tokens(begin, begin + page_size), of_prompt))
        return self.keys[:count]
