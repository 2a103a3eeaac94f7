"""Fill-in-the-middle, and near-duplicates: documents in another order, and those left out."""

import dataclasses
import json

import numpy as np
import pytest

from configs.base import DataConfig
from configs.checks import UserError
from data.infilling import OWN_MARKS, infilled, is_drawn, restored
from data.near_duplicates import HeldOutIndex, signature, similarity
from data.pipeline import prepare_corpus
from data.streamed import LIKE_TRAINING
from data.tokenizers.infilling import find_marks
from data.tokenizers.tokenizer import train_tokenizer
from data.tokenizers.tokenizer_export import write_public_tokenizer
from tests import tiny
from tests.data.test_chats import make_tokenizer


def test_a_document_is_split_at_characters_and_nothing_is_lost():
    texts = ["def f(x):\n    return x\n", "ä☕ß" * 7, "x"]
    tokenizer = train_tokenizer(texts, 300, OWN_MARKS)
    marks = find_marks(tokenizer)
    assert marks is not None
    orders = set()
    for text in texts:
        for i in range(30):
            ids = np.array(infilled(text, f"{i}", tokenizer, marks, 0))
            assert ids[:2].tolist() == [0, marks[0]]
            assert [x for x in ids.tolist() if x in marks] == list(marks)
            assert restored(ids, tokenizer, marks) == text
            orders.add(tuple(ids.tolist()))
    assert len(orders) > 30  # the names draw other places
    plain = np.array([0, *tokenizer.encode(texts[0]).ids])
    assert restored(plain, tokenizer, marks) == texts[0]
    drawn = np.mean([is_drawn(f"doc {i}", 0.3) for i in range(4000)])
    assert drawn == pytest.approx(0.3, abs=0.03)  # four deviations


def test_the_rate_is_of_the_training_documents_alone(tmp_path):
    tiny.write_sources(tmp_path, files=40)
    data = dataclasses.replace(
        tiny.run(tmp_path).data, infill_rate=0.5, directory=str(tmp_path / "infilled")
    )
    corpus = prepare_corpus(data, 320)
    tokenizer = corpus.tokenizer()
    marks = find_marks(tokenizer)
    assert marks is not None
    train = list(corpus.training().documents())
    split = [name for name, ids, _ in train if marks[2] in ids.tolist()]
    assert split == [name for name, _, _ in train if is_drawn(name, 0.5)]
    assert 0 < len(split) < len(train)
    assert not any(marks[0] in ids.tolist() for _, ids, _ in corpus.held_out().documents())
    for name, ids, _ in train:
        text = (tmp_path / "sources" / f"{name}.py").read_text()
        assert restored(ids, tokenizer, marks) == text
    write = tmp_path / "tokenizer"
    write.mkdir()
    write_public_tokenizer(write, make_tokenizer())
    other = dataclasses.replace(data, tokenizer=str(write), directory=str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a tokenizer with tokens before prefix, suffix"):
        prepare_corpus(other, 330)
    with pytest.raises(UserError, match=r"infill_rate=0.5 is for text"):
        DataConfig(form="chat", infill_rate=0.5)


def test_similarity_is_the_share_of_runs_of_words_in_common():
    """Of 128 hashes the estimate's deviation is below 0.045: within 0.15."""
    words = [f"w{i}" for i in range(400)]
    for kept in (400, 300, 100, 0):
        other = words[:kept] + [f"v{i}" for i in range(400 - kept)]
        runs = [{tuple(x[i : i + 5]) for i in range(396)} for x in (words, other)]
        expected = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        found = similarity(signature(" ".join(words)), signature(" ".join(other)))
        assert found == pytest.approx(expected, abs=0.15)
    index = HeldOutIndex([" ".join(words), "something else entirely, said in a few words"], 0.8)
    index.compare(" ".join([*words[:396], "new", "words", "at", "the", "end"]).upper())
    assert list(index.found) == [0]


def test_near_duplicates_of_training_documents_are_not_held_out(tmp_path):
    rng = np.random.default_rng(0)
    fresh = [" ".join(f"word{x}" for x in rng.integers(0, 5000, 80)) for _ in range(40)]
    texts = [*fresh, *(text + " and little more" for text in fresh)]  # every text twice, nearly
    records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(records)
    data = DataConfig(
        source=str(tmp_path / "texts.jsonl"),
        directory=str(tmp_path / "all"),
        seq_len=32,
        holdout_fraction=0.3,
    )
    names = {}
    for limit in (None, 0.7):
        data = dataclasses.replace(
            data, max_similarity=limit, directory=str(tmp_path / f"corpus_{limit}")
        )
        corpus = prepare_corpus(data, 300)
        names[limit] = [
            {int(name.rpartition(":")[2]) - 1 for name in file.sidecar.names}
            for file in (corpus.training(), corpus.held_out())
        ]
    train, held_out = names[None]
    assert names[0.7][0] == train
    alone = {i for i in held_out if (i + 40) % 80 in held_out}
    assert 0 < len(alone) < len(held_out)
    assert names[0.7][1] == alone
    left_out = corpus.left_out()
    assert left_out is not None
    assert [x.reason for x in left_out] == [LIKE_TRAINING] * (len(held_out) - len(alone))
