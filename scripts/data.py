"""Shows what a run reads: documents as the model sees them, with what the loss counts.

    moesaic data show runs/corpora/chats
    moesaic data show runs/chats --documents 5 --from 20

The folder is a corpus, or a run, which keeps the held-out documents. In a terminal, the tokens that
the loss counts are green and the others grey; elsewhere the former stand between [ and ].
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from configs.checks import require
from data.preferences import COUNTED, REJECTED, SIDES
from data.token_file import TokenFile
from data.tokenizers.tokenizer import load_tokenizer
from scripts import command

GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    folder, first = arguments.folder, arguments.first
    path = folder / "train.bin"
    if arguments.held_out or not path.exists():
        path = folder / "held_out.bin"
    require(
        path.exists(),
        f"{folder} holds neither train.bin nor held_out.bin: name a corpus (runs/corpora/...) or a "
        "run",
    )
    file, tokenizer = TokenFile(path), load_tokenizer(folder / "tokenizer.json")
    count = len(file.sidecar.names)
    require(
        arguments.documents > 0 and 0 <= first < count,
        f"--documents {arguments.documents} from --from {first} are none of {path}, which has "
        f"{count:,}, numbered from 0",
    )
    print(f"{path}: {count:,} documents, {file.sidecar.num_tokens:,} tokens")
    for i in range(first, min(first + arguments.documents, count)):
        print("".join(show_document(file, tokenizer, i, in_colour=sys.stdout.isatty())))


def show_document(
    file: TokenFile, tokenizer: Tokenizer, document: int, *, in_colour: bool
) -> Iterator[str]:
    """Its name and how many of its tokens the loss counts, then its text in pieces."""
    begin, end = file.bounds(document)
    ids = np.asarray(file.tokens[begin:end]).tolist()
    mask = np.ones(len(ids), np.uint8) if file.loss_mask is None else file.loss_mask[begin:end]
    is_rejected = mask >= REJECTED if file.sidecar.has_pairs else np.zeros(len(ids), bool)
    counts = (mask & COUNTED).astype(bool)
    sides = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_rejected)) + 1)
    for places in sides:
        counts[places[0]] = False  # nothing comes before it that could predict it
    name = file.sidecar.names[document]
    yield f"\n--- {document}: {name}, {len(ids):,} tokens, the loss counts {counts.sum():,}\n"
    for side, places in enumerate(sides):
        if len(sides) > 1:
            yield f"{chr(10) if side else ''}{SIDES[side]}:\n"
        own = slice(places[0], places[-1] + 1)
        yield from _show(tokenizer, ids[own], counts[own].tolist(), in_colour=in_colour)


def _show(
    tokenizer: Tokenizer, ids: list[int], counts: list[bool], *, in_colour: bool
) -> Iterator[str]:
    marks = ((GREY, PLAIN), (GREEN, PLAIN)) if in_colour else (("", ""), ("[", "]"))
    for is_counted, pairs in itertools.groupby(zip(counts, ids, strict=True), lambda x: x[0]):
        before, after = marks[is_counted]
        text = tokenizer.decode([token for _, token in pairs], skip_special_tokens=False)
        yield f"{before}{text}{after}"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=["show"])
    parser.add_argument("folder", type=Path, help="of a corpus or a run")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="I", help="from 0")
    parser.add_argument("--held-out", action="store_true", help="of a corpus: the held-out ones")
    return parser


if __name__ == "__main__":
    command.execute(main)
