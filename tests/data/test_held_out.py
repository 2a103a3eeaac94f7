"""Held-out rows: each of the file's once, whatever the batch; the bytes of tokens."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from data.held_out import SEGMENTS, held_out_batches, held_out_rows, token_bytes
from data.packing import PackedRows, StreamRows, TokenFile
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import END_OF_TEXT_ID
from tests import tiny

L, ALL = 32, 10**6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("held_out")
    tiny.write_sources(tmp_path)
    return prepare_corpus(tiny.run(tmp_path).data, 300)


@pytest.mark.parametrize("rows_at_once", [1, 7, 8])
def test_all_rows_are_there_and_what_fills_up_is_marked(corpus, rows_at_once):
    file = corpus.held_out()
    packed = PackedRows(file, L)
    batch = held_out_batches(file, L, ALL, rows_at_once)
    assert batch["tokens"].shape == (-(-len(packed) // rows_at_once), rows_at_once, L)
    for name, x_SBL in batch.items():
        x_RL = x_SBL.reshape(-1, L)
        for row in range(len(packed)):
            np.testing.assert_array_equal(x_RL[row], packed[row][name])
        if name != "tokens":
            assert (x_RL[len(packed) :] == -1).all()


def test_a_few_rows_are_spread_over_the_file(corpus):
    rows = held_out_rows(corpus.held_out(), L, 5, streams=False)
    last = len(PackedRows(corpus.held_out(), L)) - 1
    np.testing.assert_array_equal(rows, [np.round(np.linspace(0, last, 5))])


def test_few_rows_take_a_small_batch(corpus):
    batch = held_out_batches(corpus.held_out(), L, 5, 16, multiple_of=4)
    assert batch["tokens"].shape == (1, 8, L)


def test_streams_go_on_from_batch_to_batch(corpus):
    """As StreamRows cuts them, where the file holds whole streams only."""
    file = corpus.held_out()
    count = len(PackedRows(file, L)) // SEGMENTS
    whole = TokenFile(file.path)
    whole.sidecar = dataclasses.replace(file.sidecar, num_tokens=count * SEGMENTS * L + 1)
    expected = StreamRows(whole, L, count, 0, 1)
    assert expected.stream_rows == SEGMENTS
    batch = held_out_batches(whole, L, ALL, ALL, streams=True)
    assert batch["tokens"].shape == (SEGMENTS, count, L)
    for segment in range(SEGMENTS):
        for stream in range(count):
            row = expected[segment * count + stream]
            for name, x_SBL in batch.items():
                np.testing.assert_array_equal(x_SBL[segment, stream], row[name])


def test_groups_of_streams_are_cut_off_from_each_other(corpus):
    batch = held_out_batches(corpus.held_out(), L, 3 * SEGMENTS, 2, streams=True)
    assert batch["tokens"].shape == (2 * SEGMENTS, 2, L)
    assert (batch["positions"][[0, SEGMENTS], 0, 0] == 0).all()
    assert (batch["targets"][SEGMENTS:, 1] == -1).all()  # there are three streams


def test_a_file_shorter_than_a_row_is_measured(corpus):
    file = corpus.held_out()
    length = file.sidecar.num_tokens + 10
    batch = held_out_batches(file, length, 64, 4)
    count = file.sidecar.num_tokens - 1
    np.testing.assert_array_equal(batch["targets"][0, 0, :count], file.tokens[1:])
    assert (batch["targets"][0, 0, count:] == -1).all()
    assert batch["tokens"].shape == (1, 1, length)


def test_the_bytes_of_all_tokens_are_those_of_the_text(corpus):
    bytes_V = token_bytes(corpus.tokenizer(), 300)
    for file in (corpus.held_out(), corpus.training()):
        assert bytes_V[np.asarray(file.tokens)].sum() == file.sidecar.num_bytes
    assert bytes_V[END_OF_TEXT_ID] == 0


def test_bytes_of_characters_of_several(corpus):
    text = "naïve ≠ 漢字 🙂\n\ttext"
    bytes_V = token_bytes(corpus.tokenizer(), 300)
    assert bytes_V[corpus.tokenizer().encode(text).ids].sum() == len(text.encode())


def test_other_tokenizers_do_not_tell_their_bytes(corpus):
    words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    assert token_bytes(words, 1) is None
    words.decoder = decoders.Metaspace()
    assert token_bytes(words, 1) is None
    tree = json.loads(corpus.tokenizer().to_str())
    tree["decoder"] = {"type": "Sequence", "decoders": [tree["decoder"]]}
    assert token_bytes(Tokenizer.from_str(json.dumps(tree)), 300) is not None
