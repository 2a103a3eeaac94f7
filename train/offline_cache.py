"""Caches made ahead: teachers' best tokens for the rows that a run will read, on disk, for any
number of students.

    cache.json        what was asked of whom: teacher, data, order, form
    rows.npy          numbers of the rows, in the order in which the run reads them
    shard_00000.bin   the next rows, each compressed by itself, so that any of them is read alone

A cache is tied to its teacher, its data and its order by fingerprints. It is made shard by shard;
each appears under its name once it is whole, so that the same command goes on after a kill.

B rows, L length, J teacher tokens kept.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from checkpoint.provenance import ModelOrigin
from configs.base import RunConfig
from configs.checks import UserError, require
from configs.serialization import to_json
from data.mixture_rows import rows_of_sources
from data.packing import packed_rows
from data.pipeline import Corpus, batches
from data.tokenizers.tokenizer import fingerprint
from formats.atomic_folder import replace_text
from formats.small_files import read_record
from train.loop import to_devices
from train.progress import ProgressBar
from train.teachers import Batch, View

SHARD_BYTES = 2**24
"""Of a shard before compression, about."""
FORM = 1
"""Version of the files' form."""
AGAIN = "delete the folder and make the cache again"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """cache.json."""

    form: int = FORM
    teacher: ModelOrigin
    training_tokens: str
    """SHA-256 of the token file."""
    rows: str
    """SHA-256 of rows.npy's numbers."""
    num_rows: int
    seq_len: int
    top_k: int
    temperature: float
    id_bytes: int
    """2 or 4, of a token's number."""
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def bytes_per_row(self) -> int:
        """Before compression: numbers and float16 log-probabilities, and the tail's."""
        return self.seq_len * (self.top_k * (self.id_bytes + 2) + 2)


def rows_in_order(run: RunConfig, corpus: Corpus) -> np.ndarray:
    """Numbers of the rows that a run reads, int64, each once, in the order of the first reading."""
    file = corpus.training()
    distinct = _row_count(run, corpus)
    stream = batches(
        file,
        seq_len=run.data.seq_len,
        batch_size=run.batch_size,
        seed=run.seed,
        order=run.data.order,
        phases=run.data.phases,
    )
    seen: dict[int, None] = {}
    for _ in range(run.steps):
        seen.update(dict.fromkeys(next(stream)["row"].tolist()))
        if len(seen) == distinct:
            break
    return np.array(list(seen), np.int64)


def _row_count(run: RunConfig, corpus: Corpus) -> int:
    if not run.data.mixture:
        return len(packed_rows(corpus.training(), run.data.seq_len))
    return sum(len(part) for part in rows_of_sources(corpus.training(), run.data.seq_len))


def plan_cache(run: RunConfig, corpus: Corpus, teacher: ModelOrigin) -> tuple[CacheSettings, Any]:
    """The cache that a run of this kind needs, and its rows; nothing is written.

    Raises:
      UserError: a run without distill.top_k.
    """
    config = run.distill
    if config is None or config.top_k is None:
        raise UserError(
            f"{run.name} keeps no best tokens: set distill.top_k to how many of the teacher's are "
            "to be cached"
        )
    rows = rows_in_order(run, corpus)
    settings = CacheSettings(
        teacher=teacher,
        training_tokens=fingerprint(corpus.training().path),
        rows=_digest(rows),
        num_rows=len(rows),
        seq_len=run.data.seq_len,
        top_k=config.top_k,
        temperature=config.temperature,
        id_bytes=2 if run.model.vocab_size <= 2**16 else 4,
        rows_per_shard=1,
    )
    per_shard = max(SHARD_BYTES // settings.bytes_per_row, 1)
    return CacheSettings(**{**settings.__dict__, "rows_per_shard": per_shard}), rows


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def make_cache(
    directory: Path, run: RunConfig, corpus: Corpus, teacher: ModelOrigin, look: View, mesh: Mesh
) -> CacheSettings:
    """Makes the cache, or goes on with one that was begun; says its size first.

    Args:
      look: adds "teacher_ids", "teacher_log_probs" and "teacher_tail" to a batch of any rows.
    Raises:
      UserError: the folder holds another cache, or something else.
    """
    settings, rows = plan_cache(run, corpus, teacher)
    described = directory / "cache.json"
    if described.exists():
        known = read_record(CacheSettings, described, AGAIN)
        require(
            known == settings,
            f"{directory} holds a cache of another teacher, of other data, or in another form "
            f"(teacher {known.teacher}, {known.num_rows:,} rows of {known.seq_len}, top_k="
            f"{known.top_k}): name another folder, or {AGAIN}",
        )
    else:
        require(
            not directory.exists() or not any(directory.iterdir()),
            f"{directory} holds something else: name another folder for the cache",
        )
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "rows.npy", rows)
        replace_text(described, to_json(settings))
    print(
        f"the cache {directory}: {settings.num_rows:,} rows of {settings.seq_len} places with "
        f"{settings.top_k} tokens each, at most "
        f"{settings.num_rows * settings.bytes_per_row / 1e6:,.1f} MB before compression",
        flush=True,
    )
    find = _row_finder(run, corpus)
    begins = [i * settings.rows_per_shard for i in range(settings.num_shards)]
    shards = [rows[begin : begin + settings.rows_per_shard] for begin in begins]
    missing = [i for i in range(settings.num_shards) if not _shard(directory, i).exists()]
    done = len(rows) - sum(len(shards[i]) for i in missing)
    with ProgressBar("cache", total=len(rows), done=done, unit="rows") as bar:
        for i in missing:
            blobs = []
            for blob in _marked(run, shards[i], find, look, mesh, settings):
                blobs.append(blob)
                done += 1
                bar.update(done)
            _write_shard(_shard(directory, i), blobs)
    size = sum(_shard(directory, i).stat().st_size for i in range(settings.num_shards))
    print(f"made: {size / 1e6:,.1f} MB on disk", flush=True)
    return settings


def _shard(directory: Path, index: int) -> Path:
    return directory / f"shard_{index:05}.bin"


def _row_finder(run: RunConfig, corpus: Corpus) -> Any:
    """A function from a row's number to the row."""
    rows: Any = packed_rows(corpus.training(), run.data.seq_len)
    if not run.data.mixture or run.data.form == "text":
        return lambda number: rows[number]
    parts = rows_of_sources(corpus.training(), run.data.seq_len)  # each packed for itself
    firsts = np.array([part.first for part in parts])

    def find(number: int) -> Any:
        part = parts[int(np.searchsorted(firsts, number, side="right")) - 1]
        return part[number - part.first]

    return find


def _marked(
    run: RunConfig, rows: np.ndarray, find: Any, look: View, mesh: Mesh, settings: CacheSettings
) -> Iterator[bytes]:
    """The compressed answers for these rows, asked for in batches of the run's size."""
    size = run.batch_size // run.accumulation
    for begin in range(0, len(rows), size):
        own = rows[begin : begin + size]
        items = [find(int(number)) for number in own]
        items += items[:1] * (size - len(items))  # one shape alone is compiled
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        seen = look(to_devices(batch, mesh))
        names = ("teacher_ids", "teacher_log_probs", "teacher_tail")
        ids, log_probs, tails = (np.asarray(seen[name]) for name in names)
        for i in range(len(own)):
            yield _pack(ids[i], log_probs[i], tails[i], settings)


def _pack(
    ids_LJ: np.ndarray, log_probs_LJ: np.ndarray, tail_L: np.ndarray, settings: CacheSettings
) -> bytes:
    """A row, compressed. Bytes of like meaning lie together, which shrinks them further."""
    least = np.finfo(np.float16).min
    planes = (
        ids_LJ.astype(f"<u{settings.id_bytes}"),
        np.maximum(log_probs_LJ, least).astype("<f2"),
        np.maximum(tail_L, least).astype("<f2"),
    )
    split = (x.reshape(-1).view(np.uint8).reshape(-1, x.itemsize).T.tobytes() for x in planes)
    return zlib.compress(b"".join(split), 6)


def _unpack(blob: bytes, settings: CacheSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids int32 and log-probabilities float32 [L, J], and the tail's [L], which sum to 1."""
    length, top_k = settings.seq_len, settings.top_k
    data, place, found = zlib.decompress(blob), 0, []
    for dtype, shape in (
        (f"<u{settings.id_bytes}", (length, top_k)),
        ("<f2", (length, top_k)),
        ("<f2", (length,)),
    ):
        itemsize, count = np.dtype(dtype).itemsize, int(np.prod(shape))
        plane = np.frombuffer(data, np.uint8, itemsize * count, place).reshape(itemsize, count)
        found.append(np.ascontiguousarray(plane.T).view(dtype).reshape(shape))
        place += itemsize * count
    ids_LJ, log_probs_LJ, tail_L = found
    logs = np.concatenate([log_probs_LJ, tail_L[:, None]], axis=1).astype(np.float32)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))  # float16 has rounded them
    return ids_LJ.astype(np.int32), logs[:, :-1], logs[:, -1]


def _write_shard(path: Path, blobs: Sequence[bytes]) -> None:
    """The rows one after the other, behind a table of where each begins, int64 [rows + 1]."""
    ends = np.cumsum([0, *map(len, blobs)]) + 8 * (len(blobs) + 1)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(ends.astype("<i8").tobytes() + b"".join(blobs))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class OfflineCache:
    """A whole cache, read by a student."""

    def __init__(self, directory: Path, run: RunConfig, corpus: Corpus) -> None:
        """
        Raises:
          UserError: no whole cache, one of other data or another form, or one that lacks rows that
            the run will read.
        """
        config, described = run.distill, directory / "cache.json"
        assert config is not None
        assert config.top_k is not None
        make = f"make it with scripts.distill {run.name} --make-cache {directory}"
        require(described.exists(), f"there is no cache in {directory}: {make}")
        self.settings = settings = read_record(CacheSettings, described, AGAIN)
        self._check(directory, run, fingerprint(corpus.training().path))
        for i in range(settings.num_shards):
            require(
                _shard(directory, i).exists(),
                f"the cache {directory} is half made, {_shard(directory, i).name} is missing: the "
                "command that began it goes on with it",
            )
        rows = np.load(directory / "rows.npy")
        require(_digest(rows) == settings.rows, f"{directory}/rows.npy is damaged: {AGAIN}")
        self._directory, self._top_k = directory, config.top_k
        self._place = {int(number): i for i, number in enumerate(rows)}
        if len(rows) < _row_count(run, corpus):
            lacking = set(rows_in_order(run, corpus).tolist()) - set(self._place)
            require(
                not lacking,
                f"the cache {directory} lacks {len(lacking):,} rows that {run.name} will read (it "
                f"was made for fewer steps, or for another seed or batch): {make}_2 in its place",
            )

    def _check(self, directory: Path, run: RunConfig, training_tokens: str) -> None:
        config, settings = run.distill, self.settings
        assert config is not None
        assert config.top_k is not None
        wanted = (FORM, training_tokens, run.data.seq_len, config.temperature)
        have = (settings.form, settings.training_tokens, settings.seq_len, settings.temperature)
        names = ("form", "training tokens", "data.seq_len", "distill.temperature")
        differing = [
            f"{name} {old} there, {new} here"
            for name, old, new in zip(names, have, wanted, strict=True)
            if old != new
        ]
        require(
            not differing,
            f"the cache {directory} was made otherwise ({'; '.join(differing)}): make another one",
        )
        require(
            config.top_k <= settings.top_k,
            f"the cache {directory} keeps {settings.top_k} tokens, distill.top_k={config.top_k} "
            "asks for more: lower it, or make another cache",
        )

    @property
    def teacher(self) -> ModelOrigin:
        return self.settings.teacher

    def read(self, rows_B: Sequence[int]) -> Batch:
        """ "teacher_ids" int32 and "teacher_log_probs" float32 [B, L, J], "teacher_tail" [B, L].

        Raises:
          UserError: a damaged shard.
        """
        found = [self._row(int(number)) for number in rows_B]
        ids, logs, tails = (np.stack(x) for x in zip(*found, strict=True))
        kept = self._top_k
        if kept < self.settings.top_k:  # the others go into the tail
            rest = np.exp(logs[..., kept:]).sum(axis=-1) + np.exp(tails)
            ids, logs, tails = ids[..., :kept], logs[..., :kept], np.log(rest)
        return {"teacher_ids": ids, "teacher_log_probs": logs, "teacher_tail": tails}

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        settings = self.settings
        shard, place = divmod(self._place[number], settings.rows_per_shard)
        path = _shard(self._directory, shard)
        try:
            with path.open("rb") as file:
                file.seek(8 * place)
                begin, end = np.frombuffer(file.read(16), "<i8")
                file.seek(int(begin))
                return _unpack(file.read(int(end - begin)), settings)
        except (ValueError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and make it again") from error

    def view(self, mesh: Mesh) -> View:
        """What the teacher has said of a batch's rows."""

        def view(batch: Batch) -> Batch:
            rows_B = np.asarray(batch["row"]).tolist()
            return {**batch, **to_devices(self.read(rows_B), mesh)}

        return view
