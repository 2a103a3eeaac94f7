"""The comparison of our way from a file of records to tokens with the tokenizer's own."""

import json

import numpy as np
import pytest

from benchmarks import reading
from configs.checks import UserError
from data.pipeline import Corpus
from data.tokenizers.tokenizer import train_tokenizer
from scripts import bench_data

WORDS = [f"word{i}" for i in range(20)]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 40)) for _ in range(200)]


@pytest.fixture(scope="module")
def asked(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    train_tokenizer(texts, 300).save(str(folder / "tokenizer.json"))
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, str(folder / "tokenizer.json"), "text"


def test_both_make_the_same_tokens(asked, texts, tmp_path):
    """Ours begins each document with a token that says so."""
    reading.read_ours(*asked, tmp_path / "ours")
    reading.read_peer(*asked, tmp_path / "peer")
    corpus = Corpus(tmp_path / "ours")
    ours = [*corpus.training().tokens, *corpus.held_out().tokens]
    peer = np.fromfile(tmp_path / "peer" / "tokens.bin", np.uint16)
    assert len(ours) == len(peer) + len(texts)
    end = ours[0]
    assert sorted(x for x in ours if x != end) == sorted(x for x in peer if x != end)


def test_of_a_large_file_the_beginning_is_read(asked, tmp_path):
    path, *_ = asked
    assert reading.beginning(path, 10, tmp_path) == path
    whole, part = path.read_bytes(), reading.beginning(path, 0.01, tmp_path).read_bytes()
    assert whole.startswith(part)
    assert 9_500 < len(part) <= 10_000
    assert part.endswith(b"\n")


@pytest.mark.parametrize(
    ("line", "words"), [("{", "line 2 is no JSON"), ('{"a": 1}', "line 2 has no field 'text'")]
)
def test_a_broken_line_is_named_before_anything_is_timed(asked, line, words, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=words):
        reading.measure(broken, *asked[1:], rounds=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--rounds", "0"], "at least one"), (["--megabytes", "nan"], "some of the file")],
)
def test_settings_without_sense_are_refused(asked, words, expected):
    with pytest.raises(UserError, match=expected):
        bench_data.main([str(asked[0]), *words])


@pytest.mark.slow  # two processes
def test_the_rates_are_printed(asked, capsys):
    bench_data.main([str(asked[0]), "--tokenizer", asked[1], "--rounds", "1"])
    assert "ratio" in capsys.readouterr().out
