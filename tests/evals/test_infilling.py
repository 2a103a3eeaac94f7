"""Fill-in-the-middle: the parts give the file again, they fit the model, and what decides."""

import numpy as np
import pytest
from tokenizers import AddedToken

from checkpoint.run_corpus import count_tokens
from data.pipeline import prepare_corpus
from data.tokenizers.infilling import MARKS, find_marks
from evals.samples import HeldOut, Load
from evals.scoring import EXACT_MATCH, score_tokens
from evals.tasks import infilling
from evals.tasks.base import NotApplicable
from infer.score import TokenScores
from tests import tiny

LENGTH = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infilling")
    tiny.write_sources(folder)
    return prepare_corpus(tiny.run(folder).data, 300)


def held_out(corpus, *, with_marks: bool) -> HeldOut:
    tokenizer = corpus.tokenizer()
    if with_marks:
        tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS[0]])
    return HeldOut(tokenizer, corpus.held_out(), count_tokens(corpus.training(), 300), LENGTH)


@pytest.fixture(scope="module")
def samples(corpus):
    return infilling.load(Load(0, held_out=held_out(corpus, with_marks=True)))


def test_parts_are_a_files_own_text_around_one_line(corpus, samples):
    tokenizer = held_out(corpus, with_marks=True).tokenizer
    marks = find_marks(tokenizer)
    assert marks is not None
    texts = [
        tokenizer.decode(tokens[1:].tolist()) for _, tokens, _ in corpus.held_out().documents()
    ]
    assert len({s.key for s in samples}) == len(samples) > 10
    for sample in samples:
        ids = sample.tokens.tolist()
        at = [ids.index(mark) for mark in marks]
        assert at == sorted(at)
        prefix, suffix = ids[at[0] + 1 : at[1]], ids[at[1] + 1 : at[2]]
        middle = ids[at[2] + 1 : -1]
        assert len(middle) + 1 == sample.num_answer
        assert len(ids) - 1 <= LENGTH
        line = tokenizer.decode(middle)
        assert line.startswith(("total = ", "return total"))
        whole = tokenizer.decode(prefix) + line + tokenizer.decode(suffix)
        assert any(whole in text for text in texts)
        # Neither side is shortened while the other has more than half.
        if len(ids) - 1 == LENGTH:
            assert min(len(prefix), len(suffix)) > 0


def score(sample, best_ids) -> float:
    nats = np.zeros(len(best_ids), np.float32)
    return float(score_tokens(sample, TokenScores(nats, best_ids))[EXACT_MATCH])  # type: ignore[arg-type]


def test_every_token_of_the_middle_and_its_end_decide_and_nothing_else(samples):
    sample = samples[0]
    right = sample.tokens[1:].copy()
    assert score(sample, right) == 1.0
    for place in range(1, sample.num_answer + 1):
        wrong = right.copy()
        wrong[-place] = 299 if wrong[-place] != 299 else 298
        assert score(sample, wrong) == 0.0
    forgetful = right.copy()
    forgetful[: -sample.num_answer] = 1
    assert score(sample, forgetful) == 1.0


def test_a_side_has_what_the_other_leaves(corpus):
    tokenizer = held_out(corpus, with_marks=True).tokenizer
    long, short = "total = 1\n" * 40, "total\n"
    long_ids, short_ids = tokenizer.encode(long).ids, tokenizer.encode(short).ids
    assert infilling._around(tokenizer, long, short, 30) == (
        long_ids[-(30 - len(short_ids)) :],
        short_ids,
    )
    assert infilling._around(tokenizer, short, long, 30) == (
        short_ids,
        long_ids[: 30 - len(short_ids)],
    )
    assert infilling._around(tokenizer, long, long, 30) == (long_ids[-15:], long_ids[:15])


def test_a_model_that_has_no_tokens_for_it_is_told(corpus):
    with pytest.raises(NotApplicable, match="trained to fill in the middle"):
        infilling.load(Load(0, held_out=held_out(corpus, with_marks=False)))
