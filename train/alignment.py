"""Two tokenizers' tokens of one text, aligned by bytes.

A border is a number of bytes at which both end a token. From one border to the next lies a chunk:
one token of each, which are then the same bytes, or several of either.

L student's tokens of a row, U teacher's.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from configs.checks import UserError
from data.tokenizers.tokenizer import end_of_text_id
from train.server_teacher import documents

NONE, EXACT, MERGED = 0, 1, 2
"""Kinds of a place: no border lies behind its token; the next chunk is one token of each, or ends
with the text; it is several tokens of either."""


@functools.cache
def _bytes_by_character() -> dict[str, int]:
    """GPT-2's way of writing bytes as characters: those that can be seen stand for themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_strings(tokenizer: Tokenizer, name: str) -> dict[int, bytes]:
    """The bytes of each token; special ones have none.

    Raises:
      UserError: no tokenizer of bytes.
    """
    tree = json.loads(tokenizer.to_str())
    decoder = tree.get("decoder") or {}
    if "ByteLevel" not in {part.get("type") for part in decoder.get("decoders", [decoder])}:
        raise UserError(
            f"distill.vocabulary='bytes' aligns tokenizers of bytes (GPT-2's form), and that of "
            f"{name} is another kind: choose a teacher with such a one, or one vocabulary for both"
        )
    to_byte = _bytes_by_character()
    found = {
        i: bytes(to_byte[character] for character in token)
        for token, i in tree["model"]["vocab"].items()
        if all(character in to_byte for character in token)
    }
    for added in tree.get("added_tokens", []):
        found[added["id"]] = b"" if added["special"] else added["content"].encode()
    return found


@dataclass(frozen=True)
class AlignedRow:
    """A row of the student's, and the teacher's tokens of the same text."""

    tokens_U: np.ndarray
    """int32; 0 behind the last."""
    positions_U: np.ndarray
    """int32; -1 likewise."""
    targets_U: np.ndarray
    """int32, the teacher's next token of the same document; 0 where there is none."""
    kind_L: np.ndarray
    """int8, of the border behind each of the student's tokens."""
    place_L: np.ndarray
    """int32, the teacher's token that ends at that border; 0 without one."""
    end_L: np.ndarray
    """int32, the teacher's token that ends the chunk which begins there."""
    group_L: np.ndarray
    """int32, the place at which the chunk of the student's next token begins; -1 of none."""


class Alignment:
    """Two tokenizers, and what they have in common."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer, sizes: tuple[int, int]) -> None:
        """
        Args:
          sizes: of the student's and the teacher's vocabulary.
        Raises:
          UserError: one is no tokenizer of bytes.
        """
        self._teacher = teacher
        self._strings = (token_strings(student, "the student"), token_strings(teacher, "a teacher"))
        self._ends = (end_of_text_id(student), end_of_text_id(teacher))
        by_bytes = {text: i for i, text in self._strings[1].items() if text and i < sizes[1]}
        pairs = [
            (i, by_bytes[text])
            for i, text in sorted(self._strings[0].items())
            if text in by_bytes and i < sizes[0]
        ]
        pairs.append(self._ends)
        self.common_2C = np.array(pairs, np.int32).T
        """Ids of the tokens that both have, the student's and the teacher's."""
        every = (np.arange(size) for size in sizes)
        self.unmatched = tuple(
            np.setdiff1d(ids, own).astype(np.int32)
            for ids, own in zip(every, self.common_2C, strict=True)
        )
        """Ids of the student's and of the teacher's other tokens."""

    def align(
        self, tokens_L: np.ndarray, positions_L: np.ndarray, width: int, chunk: int
    ) -> AlignedRow:
        """
        Args:
          width: U.
          chunk: tokens of the student whose logits are made together: a chunk of the text that lies
            in two of them is left out.
        Raises:
          UserError: the teacher needs more than `width` tokens.
        """
        length = len(tokens_L)
        row = AlignedRow(
            tokens_U=np.zeros(width, np.int32),
            positions_U=np.full(width, -1, np.int32),
            targets_U=np.zeros(width, np.int32),
            kind_L=np.zeros(length, np.int8),
            place_L=np.zeros(length, np.int32),
            end_L=np.zeros(length, np.int32),
            group_L=np.full(length, -1, np.int32),
        )
        used = 0
        for own in documents(positions_L):
            used = self._add_document(row, tokens_L[own], own.start, used, width, chunk)
        return row

    def _add_document(
        self, row: AlignedRow, ids: np.ndarray, begin: int, used: int, width: int, chunk: int
    ) -> int:
        """Adds the teacher's tokens of a document from `used` on, and what is common; the end."""
        strings = [self._strings[0].get(int(i), b"") for i in ids]
        text = b"".join(strings)
        lead, whole = _characters(text)
        theirs = self._teacher.encode(whole, add_special_tokens=False).ids
        if ids[0] == self._ends[0]:
            theirs = [self._ends[1], *theirs]
        if used + len(theirs) > width:
            raise UserError(
                f"the teacher's tokenizer needs more than {width} tokens for a row of "
                f"{len(row.kind_L)}: the two fit together badly, choose another teacher"
            )
        own = slice(used, used + len(theirs))
        row.tokens_U[own], row.positions_U[own] = theirs, np.arange(len(theirs))
        row.targets_U[used : used + max(len(theirs) - 1, 0)] = theirs[1:]
        ends_L = np.cumsum([len(s) for s in strings])
        ends_U = lead + np.cumsum([len(self._strings[1].get(i, b"")) for i in theirs], dtype=int)
        _, at_L, at_U = np.intersect1d(ends_L, ends_U, return_indices=True)
        for i, (t, u) in enumerate(zip(at_L, at_U, strict=True)):
            place = begin + int(t)
            row.place_L[place] = used + int(u)
            if i + 1 == len(at_L):
                # Tokens behind the last border have no chunk that is known whole.
                is_end = int(t) == len(ids) - 1
                row.kind_L[place] = EXACT if is_end else NONE
                row.group_L[place] = place if is_end else -1
                continue
            after_t, after_u = int(at_L[i + 1]), int(at_U[i + 1])
            if (after_t, after_u) == (t + 1, u + 1):
                row.kind_L[place], row.group_L[place] = EXACT, place
            elif place // chunk == (begin + after_t - 1) // chunk:
                row.kind_L[place] = MERGED
                row.end_L[place] = used + after_u
                row.group_L[place : begin + after_t] = place
        return used + len(theirs)


def _characters(text: bytes) -> tuple[int, str]:
    """The whole characters of a text that may have been cut inside one, and the bytes before."""
    lead = 0
    while lead < min(len(text), 3) and text[lead] & 0xC0 == 0x80:
        lead += 1
    for end in range(len(text), max(len(text) - 4, lead - 1), -1):
        try:
            return lead, text[lead:end].decode()
        except UnicodeDecodeError:
            continue
    return lead, text[lead:].decode(errors="ignore")
