"""Corpora of records, chats, tokens and mixtures, made as their sources are read: a few megabytes
are in memory at a time, and a build that was stopped goes on where it was.

While it works, the folder has building.json: how far each unit of the sources is written. Who comes
with the same settings goes on from there, if what was read by then is unchanged on the disk; where
only the file at work has changed (a line was mended), from that file's beginning.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from configs.checks import require
from configs.data import DataConfig, MixturePart
from data.corpora import LeftOut, name_hash
from data.encoding import ahead, in_batches
from data.infilling import OWN_MARKS, infilled, is_drawn
from data.item_encoding import Encode, Encoded, encoder_of
from data.near_duplicates import HeldOutIndex
from data.sources import Item, OpenedSource, Unit, open_part
from data.token_file import token_dtype
from data.token_writer import NOTHING, TokenWriter, Written, ended_parts
from data.tokenizers.infilling import find_marks
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import end_of_text_id, fingerprint, train_tokenizer
from formats.atomic_folder import replace_text
from formats.small_files import read_record

NOTES = "building.json"
SECONDS_BETWEEN_NOTES = 5.0
TOKENIZER_BYTES = 100_000_000
"""Of the text that a tokenizer is trained on: a sample of larger corpora."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is."""

    unit: int = 0
    """Units that are whole."""
    position: int = 0
    """In the next one."""
    train: Written = NOTHING
    held_out: Written = NOTHING
    train_starts: tuple[int, ...] = ()
    """First token of each part."""
    held_out_starts: tuple[int, ...] = ()
    num_files: int = 0
    """Before the next unit's."""
    num_empty: int = 0
    digest: str = ""
    """Of the settings and all that was read."""


Split = Callable[[str, str], list[int] | None]
"""(a document's name, its text) to its tokens where its middle stands last; None: as it was."""
LIKE_TRAINING = "held out, and like a training document"


@dataclass(frozen=True, kw_only=True)
class Notes:
    now: Progress
    at_unit: Progress
    """When the unit at work began."""


@dataclass(frozen=True)
class _Place:
    """A unit, and the part of the corpus that it belongs to."""

    part: int
    unit: Unit
    is_held_out: bool
    """Of a source that is held out whole."""


class StreamedBuild:
    """What one corpus is made of, and the folder that it is made in."""

    def __init__(
        self, directory: Path, data: DataConfig, vocab_size: int, public: PublicTokenizer | None
    ) -> None:
        """
        Args:
          public: the tokenizer that data.tokenizer names; None trains one.
        """
        self.directory, self.data = directory, data
        end = 0 if public is None else end_of_text_id(public.tokenizer)
        held_out = data.held_out and replace(data.parts[0], source=data.held_out)
        self.parts: list[MixturePart] = [*data.parts, *([held_out] if held_out else [])]
        self.sources: list[OpenedSource] = [open_part(part, data, end) for part in self.parts]
        self.places = [
            _Place(i, unit, i >= len(data.parts))
            for i, source in enumerate(self.sources)
            for unit in source.units
        ]
        self.public, self.vocab_size = public, vocab_size
        self.near: dict[str, float] = {}
        """Held-out documents that are left out, and how like a training document they are."""
        own = asdict(data) | {"vocab_size": vocab_size, "directory": "", "seq_len": 0}
        for part in own["mixture"]:
            del part["weight"], part["later"]
        self.settings = json.dumps(own, sort_keys=True)

    @property
    def left_out(self) -> list[LeftOut]:
        near = [LeftOut(name, LIKE_TRAINING) for name in self.near]
        return [*(x for source in self.sources for x in source.left_out), *near]

    def has_begun(self) -> bool:
        """Whether the folder has a part of this corpus, and with it the tokenizer."""
        path = self.directory / NOTES
        if not path.exists() or not (self.directory / "tokenizer.json").exists():
            return False
        notes = read_record(Notes, path, f"delete {self.directory}")
        sha256 = fingerprint(self.directory / "tokenizer.json")
        return any(x.digest == self.digest(x, sha256) for x in (notes.now, notes.at_unit))

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer, trained on a sample of the text or the public one."""
        if self.public is not None:
            return self.public.tokenizer
        total = max(sum(place.unit.num_bytes for place in self.places), 1)
        share = TOKENIZER_BYTES / total

        def texts() -> Iterator[str]:
            taken = 0
            for place in self.places:
                for item in place.unit.items(0):
                    name = place.unit.name_of(item)
                    require(
                        item.text is not None,
                        f"{name} has tokens, and no tokenizer is named to which they belong: give "
                        "--data.tokenizer",
                    )
                    assert item.text is not None
                    is_sampled = share >= 1 or name_hash(f"tokenizer {name}") < share
                    if is_sampled and not self._is_held_out(place, item):
                        taken += item.size
                        yield item.text
                    if taken >= TOKENIZER_BYTES:
                        return

        specials = OWN_MARKS if self.data.infill_rate else ()
        return train_tokenizer(texts(), self.vocab_size, specials)

    def write(self, tokenizer: Tokenizer, tokenizer_path: Path) -> int:
        """Writes train.bin and held_out.bin with what lies beside them, from where it was; returns
        how many records were empty.

        Raises:
          UserError: what is no record or text, and one of the two would be empty.
        """
        sha256, end = fingerprint(tokenizer_path), end_of_text_id(tokenizer)
        encode = encoder_of(self.data, tokenizer, self.public, end)
        split, self.near = self._splitter(tokenizer, end), self._near_duplicates()
        found = self._found(sha256)
        done = found.now
        is_chat, dtype = self.data.form != "text", token_dtype(tokenizer)
        with (
            TokenWriter(
                self.directory / "train.bin", dtype, done.train, has_loss_mask=is_chat
            ) as train,
            TokenWriter(
                self.directory / "held_out.bin", dtype, done.held_out, has_loss_mask=is_chat
            ) as held_out,
        ):
            work = _Work(self, train, held_out, found, sha256, split)
            try:
                for place in self.places[done.unit :]:
                    work.read(place, encode)
            except BaseException:  # a broken line, an interrupt: what is written stays
                work.note()
                raise
            done = work.done
            self._require_both(done)
            files = [name for place in self.places for name in place.unit.files]
            names = [part.source for part in self.parts]
            for writer, starts in (
                (train, done.train_starts),
                (held_out, done.held_out_starts),
            ):
                parts = ended_parts(names, list(starts), writer.written.num_tokens)
                has_pairs = self.data.form == "preference"
                writer.finish(sha256, end, files, parts, has_pairs=has_pairs)
        (self.directory / NOTES).unlink(missing_ok=True)
        return done.num_empty

    def _splitter(self, tokenizer: Tokenizer, end_of_text: int) -> Split:
        """What gives a training document's tokens where its middle is to be filled in.

        Raises:
          UserError: the tokenizer has no tokens for it.
        """
        rate, marks = self.data.infill_rate, find_marks(tokenizer)
        if not rate:
            return lambda name, text: None
        require(
            marks is not None,
            f"data.infill_rate={rate} needs a tokenizer with tokens before prefix, suffix and "
            f"middle, such as {', '.join(OWN_MARKS)}, and {self.data.tokenizer!r} has none: name "
            "another, or none, and one is trained",
        )
        assert marks is not None

        def split(name: str, text: str) -> list[int] | None:
            if not is_drawn(name, rate):
                return None
            return infilled(text, name, tokenizer, marks, end_of_text)

        return split

    def _near_duplicates(self) -> dict[str, float]:
        """Held-out documents that are more like a training document than data.max_similarity."""
        limit = self.data.max_similarity
        if limit is None:
            return {}
        print("comparing held-out documents with those to train on ...", flush=True)
        held_out = {name: text for name, text, is_held in self._texts() if is_held}
        index = HeldOutIndex(held_out.values(), limit)
        for _, text, is_held in self._texts():
            if not is_held:
                index.compare(text)
        names = list(held_out)
        return {names[i]: share for i, share in sorted(index.found.items())}

    def _texts(self) -> Iterator[tuple[str, str, bool]]:
        """Each document's name, text, and whether it is held out; of chats all their text."""
        for place in self.places:
            for item in place.unit.items(0):
                text = item.text if item.messages is None else str(item.messages)
                if text:
                    yield place.unit.name_of(item), text, self._is_held_out(place, item)

    def _require_both(self, done: Progress) -> None:
        count = done.train.num_documents + done.held_out.num_documents
        apart = "data.held_out" if self.data.held_out else "--data.holdout-fraction"
        require(
            done.train.num_documents > 0 and done.held_out.num_documents > 0,
            f"of {count} documents {done.train.num_documents} are for training and "
            f"{done.held_out.num_documents} held out: add documents or change {apart}",
        )

    def _found(self, tokenizer_sha256: str) -> Notes:
        """How far the folder is."""
        path = self.directory / NOTES
        nothing = Notes(now=Progress(), at_unit=Progress())
        if not path.exists():
            return nothing
        notes = read_record(Notes, path, f"delete {self.directory}")
        for progress in (notes.now, notes.at_unit):
            if progress.digest == self.digest(progress, tokenizer_sha256):
                print(f"going on with the corpus after {_counted(progress)}", flush=True)
                return replace(notes, now=progress)
        print("the corpus is made anew: its sources have changed since it was begun", flush=True)
        return nothing

    def digest(self, progress: Progress, tokenizer_sha256: str) -> str:
        """SHA-256 of what has been read, how, and by which tokenizer."""
        count = progress.unit + (1 if progress.position else 0)
        stamps = [place.unit.stamp for place in self.places[:count]]
        text = json.dumps([self.settings, tokenizer_sha256, stamps])
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_held_out(self, place: _Place, item: Item) -> bool:
        if place.is_held_out or self.data.held_out:
            return place.is_held_out
        if item.is_held_out is not None:
            return item.is_held_out
        return name_hash(place.unit.name_of(item)) < self.data.holdout_fraction


class _Work:
    """The files as they grow, and the notes on them."""

    def __init__(
        self,
        build: StreamedBuild,
        train: TokenWriter,
        held_out: TokenWriter,
        found: Notes,
        tokenizer_sha256: str,
        split: Split,
    ) -> None:
        self._split = split
        self.build, self.train, self.held_out = build, train, held_out
        self.done, self._at_unit = found.now, found.at_unit
        done = found.now
        self._sha256 = tokenizer_sha256
        self._last_note = self._began = time.monotonic()
        self._bytes_before = done.train.num_bytes + done.held_out.num_bytes

    def read(self, place: _Place, encode: Encode) -> None:
        """Writes the documents of a unit."""
        done = self.done
        if place.part >= len(done.train_starts):  # the first unit of its part
            done = replace(
                done,
                train_starts=(*done.train_starts, self.train.written.num_tokens),
                held_out_starts=(*done.held_out_starts, self.held_out.written.num_tokens),
            )
        self.done = done
        if not done.position:
            self._at_unit = self._signed(done)
        batches = in_batches(place.unit.items(done.position), lambda item: item.size)
        for batch, documents in ahead((x, encode(place.unit, x)) for x in batches):
            self._write(place, batch, documents)
            if time.monotonic() - self._last_note >= SECONDS_BETWEEN_NOTES:
                self.note()
        self.done = replace(
            self.done,
            unit=self.done.unit + 1,
            position=0,
            num_files=self.done.num_files + len(place.unit.files),
        )

    def _write(self, place: _Place, batch: list[Item], documents: list[Encoded | None]) -> None:
        empty = 0
        for item, document in zip(batch, documents, strict=True):
            if document is None:
                empty += 1
                continue
            is_held_out = self.build._is_held_out(place, item)
            if is_held_out and place.unit.name_of(item) in self.build.near:
                continue
            writer = self.held_out if is_held_out else self.train
            file = self.done.num_files + item.file
            ids = np.asarray(document.ids)
            if writer is self.train and item.text is not None:
                ids = np.asarray(self._split(place.unit.name_of(item), item.text) or ids)
            writer.append(ids, document.num_bytes, file, item.number, document.mask)
        self.done = replace(
            self.done,
            position=batch[-1].position,
            train=self.train.written,
            held_out=self.held_out.written,
            num_empty=self.done.num_empty + empty,
        )

    def _signed(self, progress: Progress) -> Progress:
        return replace(progress, digest=self.build.digest(progress, self._sha256))

    def note(self) -> None:
        """Writes down how far it is, and says so."""
        self._last_note = time.monotonic()
        self.train.flush()
        self.held_out.flush()
        notes = Notes(now=self._signed(self.done), at_unit=self._at_unit)
        replace_text(self.build.directory / NOTES, json.dumps(asdict(notes)))
        num_bytes = self.done.train.num_bytes + self.done.held_out.num_bytes
        speed = (num_bytes - self._bytes_before) / (self._last_note - self._began) / 1e6
        units = f"{self.done.unit} of {len(self.build.places)} files whole"
        print(f"making tokens: {_counted(self.done)}, {units}, {speed:.1f} MB/s", flush=True)


def _counted(progress: Progress) -> str:
    """Its documents and megabytes."""
    documents = progress.train.num_documents + progress.held_out.num_documents
    num_bytes = progress.train.num_bytes + progress.held_out.num_bytes
    return f"{documents:,} documents, {num_bytes / 1e6:,.0f} MB of text"
