"""Calls of functions in an answer."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from data.tokenizers.tool_declarations import CLOSE, OPEN
from infer.function_calls import read_calls
from infer.server.reply_text import overlap

BARE = ("{", "[", "```")
"""Beginnings of an answer that may be calls without tags."""


@dataclass(frozen=True)
class ToolCall:
    """A call as clients get it."""

    id: str
    name: str
    arguments: str
    """JSON of an object."""


class ToolText:
    """Text of an answer in which calls of these functions are found."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._has_begun = False
        self._is_bare = False
        self._follows_call = False
        self.num_calls = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text that is no part of a call, and the calls that are complete."""
        self._held += text
        said, calls = "", []
        while self._held and not self._is_bare:
            if not self._has_begun and not self._begin():
                break
            at = self._held.find(OPEN)
            if at < 0:
                at = len(self._held) - overlap(self._held, OPEN)
            said += self._take(at)
            end = self._held.find(CLOSE)
            if not self._held.startswith(OPEN) or end < 0:
                break
            whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
            found = self._read(whole)
            calls += found
            said += "" if found else whole
            self._follows_call = bool(found)
        return said, calls

    def _take(self, size: int) -> str:
        """So much of what is held, without the blanks that follow a call."""
        text, self._held = self._held[:size], self._held[size:]
        if self._follows_call:
            text = text.lstrip()
            self._follows_call = not text
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left: a call whose tag was not closed, or text."""
        rest = self._take(len(self._held))
        calls = self._read(rest) if rest else []
        return ("" if calls else rest), calls

    def _begin(self) -> bool:
        """Whether it is known how the answer begins."""
        rest = self._held.lstrip()
        if not rest or (rest.startswith("`") and len(rest) < 3):
            return False
        self._has_begun = True
        self._is_bare = rest.startswith(BARE)
        return not self._is_bare

    def _read(self, text: str) -> list[ToolCall]:
        """None where the text is no call, or calls a function that was not declared."""
        calls = read_calls(text)
        if not calls or any(name not in self._names for name, _ in calls):
            return []
        try:
            written = [(name, json.dumps(dict(args), allow_nan=False)) for name, args in calls]
        except (TypeError, ValueError):  # Python's values that JSON has not
            return []
        self.num_calls += len(calls)
        return [ToolCall(f"call_{secrets.token_hex(12)}", *each) for each in written]
