"""Corpora with a public tokenizer: its own end of text, nothing added, damage noticed."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from configs.checks import UserError
from data.corpora import read_documents
from data.packing import PackedRows
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import end_of_text_id, train_tokenizer
from evals.tasks import line_completion, stdlib_bpb
from tests import tiny
from tests.evals.test_tasks import held_out, knows_all, scored

BEGIN = 2
SPECIALS = ("<unk>", "</s>", "<s>", "<|start|>")


def public_tokenizer(texts, specials=SPECIALS) -> Tokenizer:
    """As Llama's: <s> begins a text by a template, id 0 is another token; offsets leave blanks out
    and long texts are cut off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = specials[BEGIN]
    template = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    tokenizer.enable_truncation(64)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("public")
    sources = tiny.write_sources(tmp_path)
    (tmp_path / "public").mkdir()
    texts = (document.text for document in read_documents(str(sources), ".py"))
    public_tokenizer(texts).save(str(tmp_path / "public" / "tokenizer.json"))
    return tmp_path


def data_of(folder, **changes):
    data = dataclasses.replace(tiny.run(folder).data, tokenizer=str(folder / "public"))
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def corpus(folder):
    return prepare_corpus(data_of(folder), 300)


def test_documents_begin_with_the_tokenizers_own_token_once(folder, corpus):
    """Were the template kept, each document would begin with two, and be cut after 64 tokens."""
    texts = {d.name: d.text for d in read_documents(str(folder / "sources"), ".py")}
    tokenizer = corpus.tokenizer()
    for file in (corpus.training(), corpus.held_out()):
        for name, tokens, num_bytes in file.documents():
            assert tokens[0] == BEGIN
            assert BEGIN not in tokens[1:]
            text = tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False)
            assert text == texts[name]
            assert num_bytes == len(text.encode())


def test_positions_restart_at_that_token(corpus):
    file = corpus.training()
    rows = PackedRows(file, 32)
    starts = set(file.sidecar.starts)
    for i in range(len(rows)):
        expected, count = [], 0
        for place in range(32 * i, 32 * (i + 1)):
            count = 0 if place in starts or place == 32 * i else count + 1
            expected.append(count)
        np.testing.assert_array_equal(rows[i]["positions"], expected)


def test_evaluations_work_with_it(corpus):
    """Offsets hold the blanks before a line, or no line could be found."""
    lines = line_completion.load(held_out(corpus))
    assert len(lines) > 10
    assert scored(line_completion.TASKS[0], lines, knows_all) == 1.0
    tokens = sum(len(t) - 1 for _, t, _ in corpus.held_out().documents())
    total = sum(size for _, _, size in corpus.held_out().documents())
    files = stdlib_bpb.load(held_out(corpus))
    bits = scored(stdlib_bpb.TASKS[0], files, knows_all)
    assert bits == pytest.approx(tokens / total, rel=1e-6)


def test_the_end_of_text_by_the_names_of_public_models():
    ours = train_tokenizer(["text"], 257)
    assert end_of_text_id(ours) == 0
    ours.add_special_tokens(["<s>"])  # StarCoder's and SmolLM2's name goes before
    assert end_of_text_id(ours) == 0
    llama = public_tokenizer(["text"], ("<unk>", "<|end_of_text|>", "<|begin_of_text|>"))
    assert end_of_text_id(llama) == 2
    with pytest.raises(UserError, match="no token that stands between documents"):
        end_of_text_id(public_tokenizer(["text"], ("<unk>", "[CLS]", "[SEP]")))


@pytest.mark.parametrize(
    ("changes", "vocab_size", "sentence"),
    [
        ({}, 280, "has 290 tokens, model.vocab_size=280 is below that"),
        ({"tokenizer": "nowhere"}, 300, "data.tokenizer='nowhere' is no tokenizer"),
    ],
)
def test_what_is_no_tokenizer_of_the_model_is_refused(folder, changes, vocab_size, sentence):
    data = data_of(folder, directory=str(folder / "refused"), **changes)
    with pytest.raises(UserError, match=sentence):
        prepare_corpus(data, vocab_size)
    assert not (folder / "refused").exists()


def test_the_folder_remembers_which_tokenizer_made_it(folder, corpus):
    data = data_of(folder)
    with pytest.raises(UserError, match="was made with tokenizer="):
        prepare_corpus(dataclasses.replace(data, tokenizer=None), 300)
    by_file = dataclasses.replace(
        data,
        tokenizer=str(folder / "public" / "tokenizer.json"),
        directory=str(folder / "by_file"),
    )
    other = prepare_corpus(by_file, 300)
    shas = [json.loads((c.directory / "corpus.json").read_text()) for c in (corpus, other)]
    assert shas[0]["tokenizer_sha256"] == shas[1]["tokenizer_sha256"]
    train_tokenizer(["other"], 290).save(str(other.tokenizer_path))
    with pytest.raises(UserError, match="is not the tokenizer that the token files"):
        prepare_corpus(by_file, 300)


def test_corpora_of_older_versions_are_still_read(tmp_path):
    """Their corpus.json and sidecars know no public tokenizers."""
    tiny.write_sources(tmp_path)
    data = tiny.run(tmp_path).data
    corpus = prepare_corpus(data, 300)
    for name in ("corpus.json", "train.json", "held_out.json"):
        path = corpus.directory / name
        tree = json.loads(path.read_text())
        for key in ("tokenizer", "tokenizer_sha256", "end_of_text_id"):
            if not (key == "tokenizer_sha256" and name != "corpus.json"):
                tree.pop(key, None)
        path.write_text(json.dumps(tree))
    assert prepare_corpus(data, 300).training().sidecar.end_of_text_id == 0
