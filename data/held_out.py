"""Held-out rows to measure a run on as it trains: the same ones whatever the batch and the mesh.

S batches, B rows of a batch, L length, V vocab.
"""

import json

import numpy as np
from tokenizers import Tokenizer

from data.packed_chats import PackedChats
from data.packing import TokenFile

SEGMENTS = 8
"""Rows of a stream that follow each other, for a model with memory: the first has nothing behind
it."""


def held_out_rows(file: TokenFile, seq_len: int, max_rows: int, *, streams: bool) -> np.ndarray:
    """Numbers of the rows to measure, int32 [S, N]; row r has the inputs [r * L, (r + 1) * L).

    At most max_rows of them, spread evenly over the file: single ones, S = 1, or for a model with
    memory N streams of S rows that follow each other.
    """
    num_rows = max((file.sidecar.num_tokens - 1) // seq_len, 1)
    if file.sidecar.has_loss_mask:
        num_rows = len(PackedChats(file, seq_len))
    count = min(max_rows, num_rows)
    length = min(SEGMENTS, count) if streams else 1
    starts_N = np.linspace(0, num_rows - length, count // length).round().astype(np.int32)
    return starts_N + np.arange(length, dtype=np.int32)[:, None]


def held_out_batches(
    file: TokenFile,
    seq_len: int,
    max_rows: int,
    rows_at_once: int,
    *,
    multiple_of: int = 1,
    streams: bool = False,
    sources: bool = False,
) -> dict[str, np.ndarray]:
    """ "tokens", "targets" and "positions" of the rows of `held_out_rows`, int32 [S, B, L].

    What fills up the last batch, or a row of a file that is shorter than one, has target and
    position -1. Streams go on from batch to batch, S of them, at one place of the batch; their
    positions do so as well (see StreamRows), and 0 at a stream's beginning cuts it off from the
    one before at that place.

    Args:
      rows_at_once: B, but for fewer rows the least multiple of `multiple_of` that holds them.
      sources: adds "source", the part of the file that each target is of.
    """
    rows_SN = held_out_rows(file, seq_len, max_rows, streams=streams)
    segments, count = rows_SN.shape
    size = min(rows_at_once, -(-count // multiple_of) * multiple_of)
    rows_SN = np.pad(rows_SN, ((0, 0), (0, -count % size)), constant_values=-1)
    rows_GSB = rows_SN.reshape(segments, -1, size).swapaxes(0, 1)
    begins_GSB = np.broadcast_to(rows_GSB[:, :1], rows_GSB.shape)  # of each row's stream
    rows_SB, begins_SB = (x.reshape(-1, size) for x in (rows_GSB, begins_GSB))
    shape = (*rows_SB.shape, seq_len)
    batch = {"tokens": np.zeros(shape, np.int32)}
    filled = ("targets", "positions", *(["source"] if sources else []))
    batch |= {name: np.full(shape, -1, np.int32) for name in filled}
    chats = PackedChats(file, seq_len) if file.sidecar.has_loss_mask else None
    for place in zip(*np.nonzero(rows_SB >= 0), strict=True):
        if chats is not None:
            row = chats[int(rows_SB[place])] | _chat_sources(chats, int(rows_SB[place]))
            for name in batch:
                batch[name][place] = row[name]
            continue
        row = _row(file, seq_len, int(rows_SB[place]), int(begins_SB[place]))
        for name in batch:
            batch[name][place][: len(row[name])] = row[name]
    return batch


def _chat_sources(chats: PackedChats, row: int) -> dict[str, np.ndarray]:
    """The part that each place of a row of chats is of."""
    source_L = np.full(chats.seq_len, -1, np.int32)
    place = 0
    for chat in chats.rows[row]:
        begin, end = chats.file.bounds(chat)
        count = min(end - begin - 1, chats.seq_len)
        source_L[place : place + count] = _part_of(chats.file, np.array([begin]))
        place += count
    return {"source": source_L}


def _part_of(file: TokenFile, places: np.ndarray) -> np.ndarray:
    """The part that holds each token; of those that begin at one place the last, which has any."""
    firsts = np.array([part.first_token for part in file.sidecar.parts] or [0])
    return (np.searchsorted(firsts, places, side="right") - 1).astype(np.int32)


def _row(file: TokenFile, seq_len: int, row: int, begin: int) -> dict[str, np.ndarray]:
    """A row, and its tokens' places in their documents or, where these began before it, in the
    stream that begins with the row `begin`.
    """
    first = row * seq_len
    window = np.asarray(file.tokens[first : first + seq_len + 1], np.int32)
    places_L = first + np.arange(len(window) - 1)
    starts = np.asarray(file.sidecar.starts)
    starts_L = starts[np.searchsorted(starts, places_L, side="right") - 1]
    positions_L = places_L - np.maximum(starts_L, begin * seq_len)
    source_L = _part_of(file, places_L + 1)
    arrays = {"tokens": window[:-1], "targets": window[1:], "positions": positions_L}
    return arrays | {"source": source_L}


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes that each token stands for, int64 [V]; 0 for special tokens.

    None where it is not known: only tokenizers of bytes (GPT-2's way of writing them) say it.
    """
    tree = json.loads(tokenizer.to_str())
    decoder = tree.get("decoder") or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" not in kinds:
        return None
    bytes_V = np.zeros(vocab_size, np.int64)
    for token, i in tree["model"]["vocab"].items():
        bytes_V[i] = len(token)  # each of its characters stands for a byte
    for added in tree.get("added_tokens", []):
        bytes_V[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return bytes_V
