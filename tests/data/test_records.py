"""Records in every form that they come in, and what is said of those that can't be read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from configs.checks import UserError
from data.records import reader_of
from data.token_file import Sidecar, write_sidecar
from data.tokenized import read_tokenized

RECORDS = [{"id": i, "text": f"Record {i}: café\n" * (i % 5), "n": None} for i in range(700)]


def lines(records=RECORDS) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(path: Path, field: str = "text", skip: int = 0) -> list[tuple[int, str]]:
    reader = reader_of(path)
    assert reader is not None
    return [(number, record[field]) for number, record in reader(path, (field,), skip)]


def write_jsonl(path: Path) -> None:
    path.write_bytes(lines())


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(lines()))


def write_zstd(path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = (lines(RECORDS[:300]), lines(RECORDS[300:]))  # one after the other, as pzstd writes
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(x) for x in frames))


def write_parquet(path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=333)


def write_arrow_stream(path: Path) -> None:
    arrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    table = arrow.Table.from_pylist(RECORDS)
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=290)


def write_arrow_file(path: Path) -> None:
    arrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    table = arrow.Table.from_pylist(RECORDS)
    with ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=290)


FORMS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_stream,
    "b.arrow": write_arrow_file,
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("skip", [0, 1, 299, 333, 700, 900])
def test_every_form_gives_the_same_records_from_any_place(tmp_path, name, skip):
    FORMS[name](tmp_path / name)
    expected = [(i + 1, record["text"]) for i, record in enumerate(RECORDS)]
    assert read(tmp_path / name, skip=skip) == expected[skip:]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_missing_column_is_said_with_those_that_are_there(tmp_path, name):
    FORMS[name](tmp_path / name)
    with pytest.raises(UserError, match=r"has no column 'content', it has id, text, n: name the"):
        read(tmp_path / name, "content")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_was_cut_is_damaged(tmp_path, name):
    path = tmp_path / name
    FORMS[name](path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match=rf"{name} is damaged.*: write or download it again"):
        read(path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "a"', "line 3 is no JSON"),
        (b'["text"]', "line 3 is a list, expected an object"),
        (b'{"text": "\xff"}', "line 3 is no UTF-8"),
        (b'{"content": "a"}', "line 3 has no field 'text', it has content: name the right one"),
        (b"[" * 100_000, "line 3 is no JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, sentence):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", skip=3) == [(4, "b")]


END = 0
DOCUMENTS = [[5, 6, 7], [9], [3, 3, 3, 3, 8]]


def write_megatron(folder: Path) -> Path:
    """As megatron/core/datasets/indexed_dataset.py lays it out: each document ends with the token,
    the first is of two sequences.
    """
    tokens = np.array([x for d in DOCUMENTS for x in (*d, END)], "<u2")
    lengths = np.array([2, 2, 2, 6], "<i4")
    pointers = np.array([0, 4, 8, 12], "<i8")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8])
    header += (4).to_bytes(8, "little") + (4).to_bytes(8, "little")
    ends = np.array([0, 2, 3, 4], "<i8")
    (folder / "t.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + ends.tobytes())
    (folder / "t.bin").write_bytes(tokens.tobytes())
    return folder / "t.bin"


def write_numpy(folder: Path) -> Path:
    np.save(folder / "t.npy", np.array([x for d in DOCUMENTS for x in (END, *d)], np.int64))
    return folder / "t.npy"


def write_ours(folder: Path) -> Path:
    tokens = np.array([x for d in DOCUMENTS for x in (END, *d)], np.uint16)
    (folder / "t.bin").write_bytes(tokens.tobytes())
    names, byte_counts = ["a", "b", "c"], [3, 1, 5]
    sizes = {"num_tokens": len(tokens), "num_bytes": 9, "byte_counts": byte_counts}
    own = {"format": 1, "dtype": "uint16", "tokenizer_sha256": "x", "names": names}
    sidecar = Sidecar(starts=[0, 4, 6], end_of_text_id=END, **own, **sizes)
    write_sidecar(folder / "t.json", sidecar)
    return folder / "t.bin"


@pytest.mark.parametrize("write", [write_megatron, write_numpy, write_ours])
def test_tokens_of_others_are_documents_without_the_token_between_them(tmp_path, write):
    path = write(tmp_path)
    found = [(number, ids.tolist()) for number, ids in read_tokenized(path, END)]
    assert found == [(i + 1, ids) for i, ids in enumerate(DOCUMENTS)]
    assert [number for number, _ in read_tokenized(path, END, skip=2)] == [3]


def test_token_files_that_contradict_themselves_are_refused(tmp_path):
    path = write_megatron(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"t.bin has 22 bytes, its index promises 24"):
        list(read_tokenized(path, END))
    (tmp_path / "t.idx").write_bytes((tmp_path / "t.idx").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"t.idx has 113 bytes, its beginning promises 114"):
        list(read_tokenized(path, END))
    (tmp_path / "t.idx").write_bytes(b"no index at all")
    with pytest.raises(UserError, match=r"is no index of Megatron's"):
        list(read_tokenized(path, END))
    (tmp_path / "t.idx").unlink()
    with pytest.raises(UserError, match=r"has neither an .idx \(Megatron's\) nor a .json"):
        list(read_tokenized(path, END))
    np.save(tmp_path / "t.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"is an array \(2, 2\) of float64, expected one row"):
        list(read_tokenized(tmp_path / "t.npy", END))
