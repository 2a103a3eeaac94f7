"""Files of tokens that others made: numpy arrays, Megatron's .bin with its .idx, and our own.

Each gives its documents as arrays of ids, memory-mapped, without the token that stands between
documents.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.checks import UserError, require
from data.token_file import TokenFile

MAGIC = b"MMIDIDX\x00\x00"
"""Begins an .idx of Megatron-LM (megatron/core/datasets/indexed_dataset.py)."""
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Its codes of the integers in a .bin."""
ENDINGS = (".npy", ".bin")
MEND = "write or download it again"

Documents = Iterator[tuple[int, np.ndarray]]
"""Numbers from 1, and ids."""


def is_tokenized(path: Path) -> bool:
    """Whether the file's name is one of tokens."""
    return path.suffix in ENDINGS


def read_tokenized(path: Path, end_of_text: int, skip: int = 0) -> Documents:
    """The documents of a file of tokens.

    Args:
      end_of_text: token between documents; it is taken off.
      skip: documents to pass over.
    Raises:
      UserError: a file that is damaged, or of none of the three kinds.
    """
    if path.suffix == ".npy":
        documents = _between(_numpy(path), end_of_text)
    elif path.with_suffix(".idx").exists():
        documents = _megatron(path)
    elif path.with_suffix(".json").exists():
        documents = _ours(path)
    else:
        raise UserError(
            f"{path} has neither an .idx (Megatron's) nor a .json (ours) beside it that says how "
            "to read it: put it there, or give a .npy"
        )
    for number, ids in enumerate(documents, start=1):
        if number > skip:
            yield number, _stripped(ids, end_of_text)


def _stripped(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    begin = 1 if len(ids) and ids[0] == end_of_text else 0
    end = len(ids) - 1 if len(ids) > begin and ids[-1] == end_of_text else len(ids)
    return ids[begin:end]


def _numpy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is no array of numpy ({error}): {MEND}") from error
    require(
        ids.ndim == 1 and ids.dtype.kind in "iu",
        f"{path} is an array {ids.shape} of {ids.dtype}, expected one row of integers",
    )
    return ids


def _between(ids: np.ndarray, end_of_text: int, at_once: int = 1 << 20) -> Iterator[np.ndarray]:
    """Pieces that the token separates, however long; empty ones are none."""
    begin = 0
    for first in range(0, len(ids), at_once):
        for place in first + np.flatnonzero(ids[first : first + at_once] == end_of_text):
            if place > begin:
                yield ids[begin:place]
            begin = int(place) + 1
    if len(ids) > begin:
        yield ids[begin:]


def _megatron(path: Path) -> Iterator[np.ndarray]:
    index = path.with_suffix(".idx")
    header = index.read_bytes()[:34] if index.stat().st_size < 34 else _head(index)
    require(
        len(header) == 34 and header[:9] == MAGIC and header[9:17] == (1).to_bytes(8, "little"),
        f"{index} is no index of Megatron's: {MEND}",
    )
    code = header[17]
    require(code in DTYPES, f"{index} says that {path.name} holds no integers (code {code})")
    dtype = np.dtype(DTYPES[code])
    sequences, documents = (int.from_bytes(header[i : i + 8], "little") for i in (18, 26))
    expected = 34 + 12 * sequences + 8 * documents
    require(
        index.stat().st_size == expected,
        f"{index} has {index.stat().st_size} bytes, its beginning promises {expected}: {MEND}",
    )
    data = np.memmap(index, np.uint8, mode="r", offset=34)
    lengths = data[: 4 * sequences].view("<i4")
    pointers = data[4 * sequences : 12 * sequences].view("<i8")
    ends = data[12 * sequences :].view("<i8")
    tokens = np.memmap(path, dtype, mode="r")
    whole = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    require(
        tokens.nbytes >= whole,
        f"{path} has {tokens.nbytes} bytes, its index promises {whole}: {MEND}",
    )
    for first, last in itertools.pairwise(ends):
        if last > first:  # the sequences of a document lie one after the other
            begin = int(pointers[first]) // dtype.itemsize
            yield tokens[begin : begin + int(lengths[first:last].sum())]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(34)


def _ours(path: Path) -> Iterator[np.ndarray]:
    file = TokenFile(path, advice=MEND)
    require(
        not file.sidecar.has_loss_mask,
        f"{path} holds chats: give the file that it was made of, with data.form='chat'",
    )
    for _, ids, _ in file.documents():
        yield ids
