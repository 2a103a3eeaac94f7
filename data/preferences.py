"""Preference pairs: two conversations that begin alike, of which the first ends better.

A pair is one document of a token file: the tokens of the chosen conversation, then those of the
rejected one. The loss mask has 1 for the tokens of the answers, those after what both begin with;
and 2 is added for the rejected conversation's. In a batch a pair is two neighbouring rows, the
chosen one first.
"""

from typing import Any, SupportsIndex

import numpy as np

from configs.checks import UserError, require
from data.chats import ASSISTANT, loss_mask, render_chat
from data.token_file import TokenFile
from data.tokenizers.public_tokenizer import PublicTokenizer

COUNTED, REJECTED = 1, 2
"""Bits of the mask."""
SIDES = ("chosen", "rejected")
"""Fields of a record."""


def encode_pair(
    record: dict[str, Any], tokenizer: PublicTokenizer, where: str, tools: Any = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and mask of a pair, and the bytes of its text.

    Args:
      record: "chosen" and "rejected", each a list of messages or the text of an answer; and under
        a name of its own, where data.text_field gives one, what both go on from: messages, or the
        text of one of the user. Without it both conversations begin with that.
      where: the file and the line, for an error's sentence.
      tools: as data.chats.render_chat's.
    Raises:
      UserError: as data.chats.render_chat; conversations that do not differ, or differ before an
        answer.
    """
    prompt = next((name for name in record if name not in SIDES), None)
    before = [] if prompt is None else _messages(record[prompt], "user", where)
    both = [[*before, *_messages(record[side], ASSISTANT, where)] for side in SIDES]
    shared = _num_shared(*both)
    require(
        both[0][shared:] != both[1][shared:],
        f"{where} has the same chosen and rejected answer: remove the pair",
    )
    require(
        shared > 0 and all(len(x) > shared and _role(x[shared]) == ASSISTANT for x in both),
        f"{where}: the chosen and the rejected conversation must begin with the same messages and "
        "go on with different turns of the assistant: name the field of what both begin with by "
        "--data.text-field",
    )
    answered = sum(_role(message) == ASSISTANT for message in both[0][:shared])
    chats = [render_chat(messages, tokenizer, where, tools=tools) for messages in both]
    encodings = tokenizer.encode_rendered([chat.text for chat in chats])
    ids, masks = [], []
    for chat, encoding, side in zip(chats, encodings, (0, REJECTED), strict=True):
        spans = chat.spans[answered:]
        mask = loss_mask(encoding.ids, encoding.offsets, spans, tokenizer.eos_ids)
        ids.append(np.asarray(encoding.ids))
        masks.append(mask + np.uint8(side))
    num_bytes = sum(len(chat.text.encode()) for chat in chats)
    return np.concatenate(ids), np.concatenate(masks), num_bytes


def _messages(value: Any, role: str, where: str) -> list[Any]:
    """A list of messages, or text as one message of this role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    require(
        isinstance(value, list) and bool(value),
        f"{where} has {value!r:.40}, expected a list of messages or text",
    )
    return value


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _num_shared(first: list[Any], second: list[Any]) -> int:
    """Messages that both begin with."""
    count = min(len(first), len(second))
    return next((i for i in range(count) if first[i] != second[i]), count)


class PreferencePairs:
    """Random access to pairs of rows of seq_len inputs and their targets."""

    def __init__(
        self, file: TokenFile, seq_len: int, first: int = 0, count: int | None = None
    ) -> None:
        """
        Args:
          first, count: the neighbouring pairs; all by default.
        Raises:
          UserError: none of them fits two rows with something to learn in each.
        """
        self.file, self.seq_len, self.first = file, seq_len, first
        count = len(file.sidecar.starts) - first if count is None else count
        found = [self._sides(i) for i in range(first, first + count)]
        is_cut = [any(end - begin - 1 > seq_len for begin, end in sides) for sides in found]
        is_learnt = [all(self._is_learnt(*side) for side in sides) for sides in found]
        self.pairs = first + np.flatnonzero(is_learnt)
        self.num_skipped, self.num_cut = count - len(self.pairs), sum(is_cut)
        if not len(self.pairs):
            raise UserError(
                f"{file.path} has no pair of which data.seq_len={seq_len} tokens hold a part of "
                "both answers: use a longer row"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Pair `index`: tokens, targets and positions [2, L], int32, and the rows' numbers [2].

        Padding has target and position -1, and what the loss doesn't count has target -1.
        """
        pair = int(index)
        sides = [self._row(*side) for side in self._sides(int(self.pairs[pair]))]
        rows = {name: np.stack([side[name] for side in sides]) for name in sides[0]}
        number = 2 * (self.first + pair)
        return {**rows, "row": np.array([number, number + 1], np.int32)}

    def _sides(self, pair: int) -> list[tuple[int, int]]:
        """First token of each conversation, and the one after its last."""
        begin, end = self.file.bounds(pair)
        assert self.file.loss_mask is not None
        middle = begin + int((self.file.loss_mask[begin:end] < REJECTED).sum())
        return [(begin, middle), (middle, end)]

    def _is_learnt(self, begin: int, end: int) -> bool:
        assert self.file.loss_mask is not None
        mask = self.file.loss_mask[begin + 1 : min(end, begin + self.seq_len + 1)]
        return bool((mask & COUNTED).any())

    def _row(self, begin: int, end: int) -> dict[str, np.ndarray]:
        end = min(end, begin + self.seq_len + 1)
        ids = np.asarray(self.file.tokens[begin:end], np.int32)
        assert self.file.loss_mask is not None
        is_counted = (self.file.loss_mask[begin + 1 : end] & COUNTED) != 0
        tokens, targets, positions = (np.full(self.seq_len, fill, np.int32) for fill in (0, -1, -1))
        count = len(ids) - 1
        tokens[:count] = ids[:-1]
        targets[:count] = np.where(is_counted, ids[1:], -1)
        positions[:count] = np.arange(count)
        return {"tokens": tokens, "targets": targets, "positions": positions}

    def parts(self) -> list["PreferencePairs"]:
        """The pairs of each source of a mixture; the numbers of their rows are apart."""
        starts, found = np.asarray(self.file.sidecar.starts), []
        for part in self.file.sidecar.parts:
            ends = (part.first_token, part.first_token + part.num_tokens)
            first, end = np.searchsorted(starts, ends)
            if end > first:
                own = PreferencePairs(self.file, self.seq_len, int(first), int(end - first))
                found.append(own)
        return found

    def describe(self) -> str:
        """How the pairs lie in rows."""
        cut = f", {self.num_cut:,} of them cut" if self.num_cut else ""
        skipped = f"; {self.num_skipped:,} left out, too long to learn" if self.num_skipped else ""
        return f"{len(self.pairs):,} pairs in two rows each{cut}{skipped}"

    def __repr__(self) -> str:  # Grain compares it on restore
        return f"PreferencePairs({self.file.path.name}, {len(self.pairs)} of {self.seq_len})"


def rows_of_pairs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[pairs, 2, ...] as rows [2 pairs, ...], those of a pair side by side."""
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def held_out_pairs(
    file: TokenFile, seq_len: int, max_rows: int, rows_at_once: int, *, multiple_of: int = 1
) -> dict[str, np.ndarray]:
    """As data.held_out.held_out_batches, of pairs: evenly spread, their rows side by side."""
    pairs = PreferencePairs(file, seq_len)
    count = max(min(max_rows // 2, len(pairs)), 1)
    chosen = np.linspace(0, len(pairs) - 1, count).round().astype(int)
    rows = rows_of_pairs({k: np.stack([pairs[i][k] for i in chosen]) for k in _ARRAYS})
    unit = np.lcm(2, multiple_of)
    size = min(rows_at_once, -(-2 * count // unit) * unit)
    padding = -2 * count % size
    filled = {
        name: np.pad(x, ((0, padding), (0, 0)), constant_values=0 if name == "tokens" else -1)
        for name, x in rows.items()
    }
    return {name: x.reshape(-1, size, seq_len) for name, x in filled.items()}


_ARRAYS = ("tokens", "targets", "positions")
