"""Folders and files as users have them: all of the text read, the rest counted with its reason."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from configs.base import DataConfig
from configs.checks import UserError
from data.corpora import Document, LeftOut, name_hash, read_source, split_lines
from data.inventory import Changes, changes, inventory
from data.pipeline import prepare_corpus
from tests import tiny

LATIN = os.fsdecode(b"caf\xe9.py")


def awkward(folder: Path) -> list[LeftOut]:
    """Adds what can't be read to a folder of sources; what must be said of it."""
    (folder / "gone.py").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.py")
    (folder / "round.py").symlink_to(folder / "round.py")
    (folder / "latin.py").write_bytes(b"caf\xe9")
    (folder / "empty.py").touch()
    (folder / "linked").symlink_to(folder)
    installed = folder / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "numpy.py").write_text("import this")
    (folder / "__pycache__").mkdir()  # without sources: nobody misses it
    return [
        LeftOut(".venv/lib/site-packages", "a folder of installed packages"),
        LeftOut("empty.py", "empty"),
        LeftOut("gone.py", "a link to nothing"),
        LeftOut("latin.py", "no UTF-8"),
        LeftOut("linked", "a linked folder"),
        LeftOut("pipe.py", "no plain file"),
        LeftOut("round.py", "can't be read: Too many levels of symbolic links"),
    ]


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    folder = tiny.write_sources(tmp_path, files=3)
    expected = awkward(folder)
    reading = read_source(str(folder), ".py")
    assert reading.left_out == expected
    assert [d.name for d in reading.documents] == ["module_0", "module_1", "module_2"]


@pytest.mark.parametrize("name", ["test", "tests", "idle_test"])
def test_a_users_own_tests_are_text_like_any_other(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.py").write_text("assert True")
    reading = read_source(str(tmp_path), ".py")
    assert reading == ([Document(f"{name}.a", "assert True")], [])


def test_names_that_are_no_utf8_are_names(tmp_path):
    """A corpus with such a file is made and used; hashes of other names are what they were."""
    folder = tiny.write_sources(tmp_path)
    (folder / LATIN).write_text("x = 1\n" * 50)
    corpus = prepare_corpus(tiny.run(tmp_path).data, 300)
    names = [*corpus.training().sidecar.names, *corpus.held_out().sidecar.names]
    assert LATIN.removesuffix(".py") in names
    assert len(names) == 13
    assert 0 <= name_hash(LATIN) < 1
    assert name_hash("json.decoder") == 0.3414872287495234  # recorded


def test_the_inventory_counts_files_tokens_and_epochs(tmp_path):
    folder = tiny.write_sources(tmp_path)
    (folder / "latin.py").write_bytes(b"caf\xe9")
    (folder / "latin2.py").write_bytes(b"caf\xe9")
    run = tiny.run(tmp_path, steps=20)
    corpus = prepare_corpus(run.data, 300)
    (sentence,) = inventory(corpus, run)
    tokens = (corpus.directory / "train.bin").stat().st_size // 2
    assert "12 files, 2 left out (2 no UTF-8: latin.py, ...), " in sentence
    assert f" {tokens:,} tokens to train on, {20 * 8 * 32 / tokens:.1f} epochs" in sentence


def test_rows_that_streams_leave_out_are_counted(tmp_path):
    tiny.write_sources(tmp_path, files=30)
    run = tiny.memory_run(tmp_path)
    corpus = prepare_corpus(run.data, 300)
    rows = (corpus.training().sidecar.num_tokens - 1) // run.data.seq_len
    for batch_size in (8, 16, rows):
        _, *others = inventory(corpus, dataclasses.replace(run, batch_size=batch_size))
        unread = rows - batch_size * (rows // batch_size)
        expected = [f"  the last {unread} rows are not read: they do not divide into the streams"]
        assert others == (expected if unread else [])


def test_files_that_come_go_or_grow_later_are_told(tmp_path):
    folder = tiny.write_sources(tmp_path)
    awkward(folder)
    run = tiny.run(tmp_path)
    corpus = prepare_corpus(run.data, 300)
    source = run.data.source
    assert changes(corpus, source, ".py") == Changes(0, 0, 0)
    (folder / "new").mkdir()
    (folder / "new" / "a.py").write_text("a = 1")
    (folder / "module_0.py").unlink()
    (folder / "module_1.py").write_text("b = 2")
    assert changes(corpus, source, ".py") == Changes(added=1, gone=1, resized=1)
    _, told = inventory(prepare_corpus(run.data, 300), run)
    assert "has changed since (files 1 added, 1 gone, 1 of another size)" in told
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()
    _, told = inventory(corpus, run)
    assert "is no longer there" in told


@pytest.mark.parametrize("spelling", ["{}/", "{}//", "{}/./", "./{}"])
def test_another_spelling_of_a_folder_is_the_same_source(tmp_path, spelling, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_sources(tmp_path)
    plain = {"holdout_fraction": 0.3, "seq_len": 32, "directory": "corpus"}
    made = prepare_corpus(DataConfig(source="sources", **plain), 300)
    other = DataConfig(source=spelling.format("sources"), **plain)
    assert other == DataConfig(source="sources", **plain)
    assert prepare_corpus(other, 300) == made
    written = json.loads(Path("corpus/corpus.json").read_text())
    Path("corpus/corpus.json").write_text(json.dumps(written | {"source": "sources/"}))
    assert prepare_corpus(other, 300) == made  # made before spellings were one


def test_a_single_file_is_a_corpus_whose_end_is_held_out(tmp_path):
    text = "".join(f"line {i} of a tale, and no more\n" for i in range(100))
    (tmp_path / "tale.txt").write_text(text)
    run = tiny.run(tmp_path)
    data = DataConfig(
        source=str(tmp_path / "tale.txt"),
        directory=run.data.directory,
        holdout_fraction=0.1,
        seq_len=32,
    )
    corpus = prepare_corpus(data, 300)
    texts = [
        corpus.tokenizer().decode(file.tokens[1:].tolist())
        for file in (corpus.training(), corpus.held_out())
    ]
    assert "".join(texts) == text
    assert texts[1].startswith("line 90 ")
    (sentence,) = inventory(corpus, tiny.run(tmp_path, data=data, steps=3))
    assert ": 1 file, " in sentence
    assert changes(corpus, data.source, data.suffix) == Changes(0, 0, 0)
    (tmp_path / "tale.txt").write_text(text + "more")
    assert changes(corpus, data.source, data.suffix) == Changes(0, 0, 1)


def test_a_single_line_cannot_be_split():
    with pytest.raises(UserError, match="leaves 1 for training and 0 held out"):
        split_lines([Document("a.txt", "one line")], 0.1)


def test_a_single_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"holds no UTF-8 text \(1 no UTF-8: a.bin\): give a text"):
        read_source(str(tmp_path / "a.bin"), ".py")


RECORDS = '{"text": "a"}\n{"text": "b", "meta": {"c": 1}}\n'


@pytest.mark.parametrize("name", ["data.jsonl", "data.JSONL", "data.ndjson", "data.txt"])
@pytest.mark.parametrize("is_file", [True, False])
def test_files_of_records_are_refused(tmp_path, name, is_file):
    (tmp_path / name).write_text(RECORDS)
    source = tmp_path / name if is_file else tmp_path
    with pytest.raises(UserError, match=r"1 files of records.*data") as refused:
        read_source(str(source), Path(name).suffix)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n', "{x}\n{y}\n", '{"a": 1}\nthen prose\n', "[1]\n[2]\n"]
)
def test_text_with_braces_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read_source(str(tmp_path), ".txt").documents == [Document("a.txt", text)]


def test_an_ending_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=r"in files ending in '.py'; it has 2 of .txt, 1 of .md"):
        read_source(str(tmp_path), ".py")
