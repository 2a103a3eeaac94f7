"""A token file of the second form (data/token_file.py) as it grows: it can be cut back to what a
note says of it, and goes on from there.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data.token_file import (
    DOCUMENT,
    TABLED,
    Part,
    Sidecar,
    documents_path,
    mask_path,
    write_sidecar,
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """How much is in the files."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0


NOTHING = Written()


class TokenWriter:
    """Appends documents; a context manager, which closes the files."""

    def __init__(
        self, path: Path, dtype: type[np.unsignedinteger], before: Written, *, has_loss_mask: bool
    ) -> None:
        """
        Args:
          path: of the tokens (.bin).
          before: what of the files stays; the rest is cut off.
        """
        self.path, self.dtype, self.written = path, np.dtype(dtype), before
        self._tokens = _cut(path, before.num_tokens * self.dtype.itemsize)
        self._documents = _cut(documents_path(path), before.num_documents * DOCUMENT.itemsize)
        self._mask = _cut(mask_path(path), before.num_tokens) if has_loss_mask else None

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[BinaryIO]:
        return [f for f in (self._tokens, self._documents, self._mask) if f is not None]

    def append(
        self,
        ids: np.ndarray,
        num_bytes: int,
        file: int,
        number: int,
        mask: np.ndarray | None = None,
    ) -> None:
        """Adds a document.

        Args:
          num_bytes: of its text in UTF-8.
          file, number: where it is from.
          mask: of chats, uint8 for each token.
        """
        row = np.array((self.written.num_tokens, num_bytes, file, number), DOCUMENT)
        self._tokens.write(ids.astype(self.dtype).tobytes())
        self._documents.write(row.tobytes())
        if self._mask is not None:
            assert mask is not None
            assert len(mask) == len(ids)
            self._mask.write(mask.astype(np.uint8).tobytes())
        self.written = Written(
            num_tokens=self.written.num_tokens + len(ids),
            num_documents=self.written.num_documents + 1,
            num_bytes=self.written.num_bytes + num_bytes,
        )

    def flush(self) -> Written:
        """Hands all to the system; returns how much that is."""
        for file in self._files:
            file.flush()
        return self.written

    def finish(
        self,
        tokenizer_sha256: str,
        end_of_text: int,
        files: list[str],
        parts: list[Part],
        *,
        has_pairs: bool = False,
    ) -> Sidecar:
        """Writes the sidecar.

        Args:
          files: names, by the indices that `append` was given.
          parts: the sources, in order.
          has_pairs: see Sidecar.
        """
        self.flush()
        with documents_path(self.path).open("rb") as table:
            digest = hashlib.file_digest(table, "sha256")
        if self._mask is not None:
            with mask_path(self.path).open("rb") as mask:
                digest.update(hashlib.file_digest(mask, "sha256").digest())
        sidecar = Sidecar(
            format=TABLED,
            dtype=self.dtype.name,
            tokenizer_sha256=tokenizer_sha256,
            end_of_text_id=end_of_text,
            files=files,
            parts=parts,
            has_loss_mask=self._mask is not None,
            has_pairs=has_pairs,
            documents_sha256=digest.hexdigest(),
            **asdict(self.written),
        )
        write_sidecar(self.path.with_suffix(".json"), sidecar)
        return sidecar


def ended_parts(names: list[str], starts: list[int], num_tokens: int) -> list[Part]:
    """The parts of a file that begin at these tokens, the last of which ends it."""
    ends = [*starts[1:], num_tokens]
    return [
        Part(name=name, first_token=start, num_tokens=end - start)
        for name, start, end in zip(names, starts, ends, strict=True)
    ]


def _cut(path: Path, size: int) -> BinaryIO:
    """The file, open at its end, which is after so many bytes."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
