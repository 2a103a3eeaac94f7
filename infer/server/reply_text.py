"""Text of an answer as it may be shown: whole characters, nothing of a stop text or of a marker.

What could become a stop text is held back until it is one, or is none. Thinking, which models put
between <think> and </think>, is told apart; stop texts don't apply to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.text_stream import TextStream

THINK, END_THINK = "<think>", "</think>"

Thinking = Literal["never", "maybe", "begun"]
"""Whether an answer may begin with thinking, or its prompt has begun it already."""


@dataclass(frozen=True)
class Shown:
    """What is shown next."""

    text: str = ""
    reasoning: str = ""
    num_tokens: int = 0
    """How many further tokens the texts shown so far take up."""


class ReplyText:
    """The text of tokens that come one by one."""

    def __init__(
        self,
        tokenizer: PublicTokenizer,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        thinking: Thinking = "never",
    ) -> None:
        """
        Args:
          prompt: tokens that the text goes on from; empty where it stands by itself.
          stops: texts that end it.
        """
        self.stopped_by: str | None = None
        """The stop text that ended it."""
        self._stream = TextStream(tokenizer, prompt)
        self._stops = tuple(stops)
        self._phase: Literal["maybe", "thinking", "after", "text"] = {
            "never": "text",
            "maybe": "maybe",
            "begun": "thinking",
        }[thinking]  # type: ignore[assignment]
        self._begins = thinking == "begun"
        """Whether line ends at the beginning of a part are left out."""
        self._held = ""
        self._length = 0
        """Of all text so far, held or not."""
        self._spans: list[tuple[int, int]] = []
        """Where the text of each token lies that is not counted as shown."""
        self._num_textless = 0
        """Newest tokens that have no text yet."""

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, tokens: Iterable[int]) -> Shown:
        """What these tokens let be shown; nothing after a stop text."""
        text, reasoning, count = "", "", 0
        for token in tokens:
            if self.is_stopped:
                break
            self._num_textless += 1
            shown = self._advance(self._stream.add([token]), is_last=False)
            text, reasoning = text + shown.text, reasoning + shown.reasoning
            count += shown.num_tokens
        return Shown(text, reasoning, count)

    def finish(self) -> Shown:
        """What is still held when the last token has come."""
        if self.is_stopped:
            return Shown()
        return self._advance(self._stream.finish(), is_last=True)

    def _advance(self, new: str, *, is_last: bool) -> Shown:
        begin, self._length = self._length, self._length + len(new)
        self._held += new
        if new or is_last:
            self._spans += [(begin, self._length)] * self._num_textless
            self._num_textless = 0
        text = reasoning = ""
        while True:
            phase = self._phase
            if phase in ("maybe", "after"):
                self._skip(is_last=is_last)
            elif phase == "thinking":
                reasoning += self._think(is_last=is_last)
            else:
                text += self._say(is_last=is_last)
            if self._phase == phase:
                break
        return Shown(text, reasoning, self._count_shown(is_last=is_last))

    def _skip(self, *, is_last: bool) -> None:
        """Blanks before thinking begins, and after it has ended."""
        rest = self._held.lstrip()
        if self._phase == "maybe" and rest.startswith(THINK):
            self._held, self._phase, self._begins = rest[len(THINK) :], "thinking", True
        elif self._phase == "after" and (rest or is_last):
            self._held, self._phase = rest, "text"
        elif self._phase == "maybe" and (is_last or not THINK.startswith(rest)):
            self._phase = "text"

    def _think(self, *, is_last: bool) -> str:
        if self._begins:
            self._held = self._held.lstrip("\n")
            self._begins = not self._held
        at = self._held.find(END_THINK)
        if at >= 0:
            said, self._held = self._held[:at].rstrip("\n"), self._held[at + len(END_THINK) :]
            self._phase = "after"
            return said
        return self._release(() if is_last else ("\n\n" + END_THINK, "\n" + END_THINK, END_THINK))

    def _say(self, *, is_last: bool) -> str:
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            said = self._held[:at]
            self._length -= len(self._held) - len(said)
            self._held = ""
            return said
        return self._release(() if is_last else self._stops)

    def _release(self, markers: Sequence[str]) -> str:
        """What can't be the beginning of one of these."""
        kept = max((overlap(self._held, marker) for marker in markers), default=0)
        said = self._held[: len(self._held) - kept]
        self._held = self._held[len(said) :]
        return said

    def _count_shown(self, *, is_last: bool) -> int:
        """Tokens whose text is shown; where a stop text ends it, those that begin before it."""
        shown = self._length - len(self._held)
        if is_last:
            count = len(self._spans)
        elif self.is_stopped:
            count = sum(begin < shown for begin, _ in self._spans)
        else:
            count = sum(end <= shown for _, end in self._spans)
        del self._spans[:count]
        return count


def overlap(text: str, marker: str) -> int:
    """Characters at the end of the text that begin the marker, short of all of it."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
