"""Rows of whole chats: none is cut in two, and each sees only itself.

Of a chat of n tokens, n - 1 are fed to the model, each with the next one as its target, where the
loss counts that one. Chats that are longer than a row lose their end. A row is filled with chats
that leave least of it empty (best fit, the longest first); the rest is padding.
"""

from typing import Any, SupportsIndex

import numpy as np

from configs.checks import UserError
from data.token_file import TokenFile

CHATS_AT_ONCE = 4096


class PackedChats:
    """Random access to rows of seq_len inputs and their targets, as PackedRows."""

    def __init__(
        self, file: TokenFile, seq_len: int, first: int = 0, count: int | None = None
    ) -> None:
        """
        Args:
          first, count: the neighbouring chats to pack; all by default.
        Raises:
          UserError: none of them fits a row with something to learn.
        """
        self.file, self.seq_len, self.first = file, seq_len, first
        starts = np.asarray(file.sidecar.starts)
        ends = np.append(starts[1:], file.sidecar.num_tokens)
        count = len(starts) - first if count is None else count
        starts, ends = starts[first : first + count], ends[first : first + count]
        lengths = np.minimum(ends - starts - 1, seq_len)
        is_learnt = _learnt(file, starts, starts + lengths + 1)
        self.num_chats = int(is_learnt.sum())
        self.num_skipped = count - self.num_chats
        self.num_cut = int((ends - starts - 1 > seq_len).sum())
        self.rows = _fitted(first + np.flatnonzero(is_learnt), lengths[is_learnt], seq_len)
        self.fullness = float(lengths[is_learnt].sum() / max(len(self.rows) * seq_len, 1))
        if not self.rows:
            raise UserError(
                f"{file.path} has no chat whose first data.seq_len={seq_len} tokens hold something "
                "to learn: use a longer row"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Row `index`: tokens, targets and positions [L], int32, and the row's own number.

        Padding has target and position -1, and what the loss doesn't count has target -1.
        """
        row = int(index)
        tokens, targets, positions = (np.full(self.seq_len, fill, np.int32) for fill in (0, -1, -1))
        place, mask = 0, self.file.loss_mask
        assert mask is not None
        for chat in self.rows[row]:
            begin, end = self.file.bounds(chat)
            end = min(end, begin + self.seq_len + 1)
            ids = np.asarray(self.file.tokens[begin:end], np.int32)
            own = slice(place, place + len(ids) - 1)
            tokens[own] = ids[:-1]
            targets[own] = np.where(mask[begin + 1 : end], ids[1:], -1)
            positions[own] = np.arange(len(ids) - 1)
            place += len(ids) - 1
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": positions,
            "row": np.int32(self.first + row),
        }

    def parts(self) -> list["PackedChats"]:
        """The rows of each source of a mixture; the numbers of their rows are apart."""
        starts = np.asarray(self.file.sidecar.starts)
        found = []
        for part in self.file.sidecar.parts:
            ends = (part.first_token, part.first_token + part.num_tokens)
            first, end = np.searchsorted(starts, ends)
            if end > first:
                found.append(PackedChats(self.file, self.seq_len, int(first), int(end - first)))
        return found

    def describe(self) -> str:
        """How the chats lie in rows."""
        cut = f", {self.num_cut:,} of them cut" if self.num_cut else ""
        skipped = f"; {self.num_skipped:,} left out, too long to learn" if self.num_skipped else ""
        return (
            f"{self.num_chats:,} chats in {len(self.rows):,} rows, {self.fullness:.0%} full{cut}"
            f"{skipped}"
        )

    def __repr__(self) -> str:  # Grain compares it on restore
        return f"PackedChats({self.file.path.name}, {len(self.rows)} rows of {self.seq_len})"


def _learnt(file: TokenFile, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether the loss counts a token of each chat but its first, bool."""
    mask = file.loss_mask
    assert mask is not None
    found = np.zeros(len(starts), bool)
    for block in range(0, len(starts), CHATS_AT_ONCE):
        own = slice(block, block + CHATS_AT_ONCE)
        base = int(starts[block])
        counted = base + np.flatnonzero(mask[base : int(ends[own].max())])
        places = np.searchsorted(counted, starts[own] + 1)
        following = np.append(counted, np.iinfo(np.int64).max)[places]
        found[own] = following < ends[own]
    return found


def _fitted(chats: np.ndarray, lengths: np.ndarray, room: int) -> list[list[int]]:
    """The chats of each row: each goes where it leaves least room, the longest first."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    has_room = 0  # bit r: a row with room for r more
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        fitting = has_room >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                has_room &= ~(1 << left)
            left -= length
        else:
            row, left = len(rows), room - length
            rows.append([])
        rows[row].append(int(chats[i]))
        if left:
            by_room[left].append(row)
            has_room |= 1 << left
    return rows
