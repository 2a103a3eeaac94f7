"""Corpora, tokenizer, token files and rows: nothing lost, nothing leaked, damage noticed."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from configs.checks import UserError
from data.corpora import Document, name_hash, read_documents, split
from data.packing import PackedRows, document_positions
from data.pipeline import Corpus, prepare_corpus
from data.tokenizers.tokenizer import END_OF_TEXT_ID, train_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    tmp_path = tmp_path_factory.mktemp("corpus")
    tiny.write_sources(tmp_path)
    return prepare_corpus(tiny.run(tmp_path).data, 300)


def test_the_standard_library_without_its_tests():
    documents = read_documents("stdlib", ".py")
    names = {document.name for document in documents}
    assert {"json.decoder", "argparse", "json"} <= names
    assert not any({"test", "tests", "idle_test"} & set(name.split(".")) for name in names)
    assert sum(len(d.text.encode()) for d in documents) > 5e6
    path = Path(sysconfig.get_path("stdlib"), "json", "decoder.py")
    assert next(d.text for d in documents if d.name == "json.decoder") == path.read_text()


def test_the_hold_out_depends_on_names_alone():
    documents = [Document(f"m{i}", "text") for i in range(2000)]
    training, held_out = split(documents, 0.05)
    assert not {d.name for d in training} & {d.name for d in held_out}
    assert len(held_out) == pytest.approx(100, abs=40)  # 4 sd of a binomial
    _, fewer = split(documents[::2], 0.05)
    assert set(fewer) <= set(held_out)
    assert name_hash("json.decoder") == name_hash("json.decoder") != name_hash("json.encoder")


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read_documents(str(tmp_path / "nowhere"), ".py")
    with pytest.raises(UserError, match=r"holds no UTF-8 text in files ending in '.py'"):
        read_documents(str(tmp_path), ".py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="holds no UTF-8 text"):
        read_documents(str(tmp_path), ".py")
    with pytest.raises(UserError, match="leaves 1 for training and 0 held out"):
        split([Document("one", "text")], 1e-9)


def test_documents_come_back_from_tokens(corpus):
    tokenizer = corpus.tokenizer()
    sources = {
        d.name: d.text for d in read_documents(str(corpus.directory.parent / "sources"), ".py")
    }
    names = []
    for file in (corpus.training(), corpus.held_out()):
        for name, tokens, num_bytes in file.documents():
            assert tokens[0] == END_OF_TEXT_ID
            text = tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False)
            assert text == sources[name]
            assert num_bytes == len(text.encode())
            names.append(name)
    assert sorted(names) == sorted(sources)


@pytest.mark.parametrize("text", ["<|endoftext|>", "naïve 日本 🙂\r\n\t x", "a<|endoftext|>b", ""])
def test_any_text_survives_and_none_is_a_special_token(corpus, text):
    ids = corpus.tokenizer().encode(text).ids
    assert END_OF_TEXT_ID not in ids
    assert corpus.tokenizer().decode(ids, skip_special_tokens=False) == text


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(["text"], 256)


def test_rows_cover_the_file_and_targets_follow(corpus):
    file = corpus.training()
    rows = PackedRows(file, 32)
    joined = np.concatenate([rows[i]["tokens"] for i in range(len(rows))])
    np.testing.assert_array_equal(joined, file.tokens[: len(joined)])
    assert file.sidecar.num_tokens - len(joined) <= 32
    for i in (0, len(rows) - 1):
        np.testing.assert_array_equal(rows[i]["targets"][:-1], rows[i]["tokens"][1:])
        assert rows[i]["row"] == i


def test_positions_restart_at_every_document():
    tokens = np.array([5, 6, END_OF_TEXT_ID, 7, 8, END_OF_TEXT_ID, END_OF_TEXT_ID, 9])
    np.testing.assert_array_equal(
        document_positions(tokens, END_OF_TEXT_ID), [0, 1, 0, 1, 2, 0, 0, 1]
    )


def test_a_prepared_corpus_is_reused_and_another_one_refused(tmp_path):
    tiny.write_sources(tmp_path)
    config = tiny.run(tmp_path).data
    first = prepare_corpus(config, 300)
    stamp = (first.directory / "train.bin").stat().st_mtime_ns
    assert (prepare_corpus(config, 300).directory / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made with vocab_size=300, this run asks for 400"):
        prepare_corpus(config, 400)
    assert not list(tmp_path.glob("corpus.building*"))


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    (tmp_path / "sources").mkdir()
    with pytest.raises(UserError):
        prepare_corpus(tiny.run(tmp_path).data, 300)
    assert not (tmp_path / "corpus").exists()
    assert not list(tmp_path.glob("corpus.building*"))


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text('{"format": 1')


def damage_format(path: Path) -> None:
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_truncate, "its sidecar promises"),
        (damage_sidecar, "is not valid JSON"),
        (damage_format, "format 99, this program reads 1"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_token_files_are_named(tmp_path, damage, sentence):
    tiny.write_sources(tmp_path)
    corpus = prepare_corpus(tiny.run(tmp_path).data, 300)
    damage(corpus.directory / "train.bin")
    with pytest.raises(UserError, match=sentence) as raised:
        corpus.training()
    assert "it will be made again" in str(raised.value)


def test_rows_longer_than_the_corpus_are_refused(corpus):
    with pytest.raises(UserError, match="too few for one row of data"):
        PackedRows(corpus.training(), 1_000_000)


def test_a_folder_that_is_no_corpus_is_refused(tmp_path):
    tiny.write_sources(tmp_path)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match="is there but holds no corpus"):
        prepare_corpus(tiny.run(tmp_path).data, 300)
