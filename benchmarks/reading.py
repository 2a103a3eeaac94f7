"""Tokenising a file of records: ours, whole and to the token file, beside `tokenizers` alone.

Both read the file, parse it, load the tokenizer and write the tokens. The peer hands a thousand
texts at once to `Tokenizer.encode_batch`, as its documentation does, and does nothing else; ours
also holds documents out, looks for near-duplicates among them, and keeps each document's place.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.alternate import Series, Worker, alternate, serve
from configs.base import DataConfig
from data.pipeline import prepare_corpus
from data.records import read_jsonl
from data.tokenizers.tokenizer import num_ids
from data.tokenizers.tokenizer_sources import load_public_tokenizer

NAMES = ("ours", "tokenizers")
TEXTS_AT_ONCE = 1000
MOST_TOKENS = 10**6  # of a vocabulary: more than any has


@dataclass(frozen=True)
class Reading:
    megabytes: float
    """Of the file."""
    ours: Series
    peer: Series


def measure(path: Path, tokenizer: str, field: str, rounds: int) -> Reading:
    """Alternating rounds of reading the whole file (.jsonl).

    Raises:
      UserError: a line of it is no record with that field.
    """
    for _ in read_jsonl(path, (field,), 0):
        pass
    asked = ["--tokenizer", tokenizer, "--field", field]
    commands = [
        [sys.executable, "-m", "benchmarks.reading", name, str(path), *asked] for name in NAMES
    ]
    workers = [
        Worker(name, command, Path.cwd()) for name, command in zip(NAMES, commands, strict=True)
    ]
    try:
        ours, peer = alternate(workers, rounds, steps=1)
    finally:
        for worker in workers:
            worker.close()
    return Reading(path.stat().st_size / 1e6, ours, peer)


def beginning(path: Path, megabytes: float, folder: Path) -> Path:
    """The file itself, or a copy of its first lines where it is larger.

    Args:
      folder: that the copy goes to.
    """
    if path.stat().st_size <= megabytes * 1e6:
        return path
    kept, copy = 0, folder / path.name
    with path.open("rb") as lines, copy.open("wb") as out:
        for line in lines:
            kept += len(line)
            if kept > megabytes * 1e6:
                break
            out.write(line)
    return copy


def read_ours(path: Path, tokenizer: str, field: str, folder: Path) -> None:
    data = DataConfig(
        source=str(path), tokenizer=tokenizer, text_field=field, directory=str(folder)
    )
    prepare_corpus(data, MOST_TOKENS)


def read_peer(path: Path, tokenizer: str, field: str, folder: Path) -> None:
    encoder = load_public_tokenizer(tokenizer)
    dtype = np.uint16 if num_ids(encoder) <= 2**16 else np.uint32
    folder.mkdir()
    with path.open() as lines, (folder / "tokens.bin").open("wb") as out:
        while texts := [json.loads(line)[field] or "" for line in islice(lines, TEXTS_AT_ONCE)]:
            for encoding in encoder.encode_batch(texts):
                out.write(np.asarray(encoding.ids, dtype).tobytes())


def main(argv: list[str]) -> None:
    """A worker, which reads the file once a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--field", required=True)
    asked = parser.parse_args(argv)
    read: Callable[..., None] = read_ours if asked.name == "ours" else read_peer
    folders = _folders()
    serve(lambda: read(asked.path, asked.tokenizer, asked.field, next(folders)), warm_steps=0)


def _folders() -> Iterator[Path]:
    """New ones, each gone when the next is asked for."""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "corpus"


if __name__ == "__main__":
    main(sys.argv[1:])
