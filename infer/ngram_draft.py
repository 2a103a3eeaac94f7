"""Drafts that a text's own tokens give (prompt lookup, Saxena 2023; n-gram speculation).

What followed the last few tokens where they stood before is likely to follow again: in code that is
edited, in quotations, in tables. A draft costs no model; what it is worth the engine measures.
"""

from dataclasses import dataclass

from configs.checks import require, require_positive


@dataclass(frozen=True)
class NgramDraft:
    """How drafts are looked up."""

    length: int = 4
    """Tokens drafted at most, which one step of the model verifies."""
    longest: int = 4
    """Last tokens that must have stood before, where so many did."""
    shortest: int = 2
    """The fewest that are looked up."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "longest", "shortest")
        require(
            self.shortest <= self.longest,
            f"draft.shortest={self.shortest} must not exceed draft.longest={self.longest}",
        )


class NgramIndex:
    """Where each few tokens of a sequence last stood."""

    def __init__(self, draft: NgramDraft) -> None:
        self._draft, self._tokens = draft, []
        self._ends: list[dict[tuple[int, ...], int]] = [
            {} for _ in range(draft.longest - draft.shortest + 1)
        ]
        """By length from the shortest on: after which token the last one but the newest ended."""

    def extend(self, tokens: list[int]) -> None:
        """The sequence goes on with these."""
        for token in tokens:
            self._note()
            self._tokens.append(token)

    def _note(self) -> None:
        """What ends here has a token after it now."""
        end = len(self._tokens)
        for i, ends in enumerate(self._ends):
            size = self._draft.shortest + i
            if end >= size:
                ends[tuple(self._tokens[end - size :])] = end

    def propose(self, most: int) -> list[int]:
        """What followed the last tokens before, `most` tokens at most; nothing if they are new."""
        most = min(most, self._draft.length)
        for i in reversed(range(len(self._ends))):
            size = self._draft.shortest + i
            if most <= 0 or len(self._tokens) < size:
                continue
            end = self._ends[i].get(tuple(self._tokens[len(self._tokens) - size :]))
            if end is not None:
                return self._continued(end, most)
        return []

    def _continued(self, begin: int, count: int) -> list[int]:
        """Tokens from there on; past the newest, what was just taken comes again."""
        taken: list[int] = []
        for at in range(begin, begin + count):
            past = at - len(self._tokens)
            taken.append(self._tokens[at] if past < 0 else taken[past])
        return taken
