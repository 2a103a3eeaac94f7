"""Tasks: closed forms, an oracle model that knows the answer, and the drawn lines themselves."""

import dataclasses
import gzip
import lzma
import re

import numpy as np
import pytest

from checkpoint.run_corpus import count_tokens
from configs.checks import UserError
from data.pipeline import prepare_corpus
from evals.aggregation import aggregate
from evals.samples import HeldOut, Load
from evals.scoring import score_tokens
from evals.task_list import describe_tasks, find_tasks, known_tasks
from evals.tasks import line_completion, stdlib_bpb
from evals.tasks.base import NotApplicable
from evals.tasks.stdlib_bpb import unigram_bits
from infer.score import TokenScores
from tests import tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("tasks")
    tiny.write_sources(tmp_path)
    return prepare_corpus(tiny.run(tmp_path).data, 300)


def held_out(corpus, length=64) -> Load:
    counts_V = count_tokens(corpus.training(), 300)
    return Load(0, held_out=HeldOut(corpus.tokenizer(), corpus.held_out(), counts_V, length))


def scored(task, samples, score) -> float:
    """The task's first metric for a model that scores documents so."""
    scores = score([sample.tokens for sample in samples])
    metric = task.metrics[0]
    values = {
        sample.key: score_tokens(sample, found)[metric]
        for sample, found in zip(samples, scores, strict=True)
    }
    return aggregate(metric, [values]).value


def knows_all(documents):
    """A model that is always right, and one bit unsure of it."""
    return [
        TokenScores(np.full(len(t) - 1, np.log(2), np.float32), t[1:].copy()) for t in documents
    ]


def knows_nothing(documents):
    return [
        TokenScores(np.full(len(t) - 1, np.log(300), np.float32), np.zeros(len(t) - 1, np.int32))
        for t in documents
    ]


def test_chats_are_no_text(corpus):
    """Their documents have no leading end of text, and of their tokens only some are counted."""
    given = held_out(corpus)
    given.held_out.tokens.sidecar = dataclasses.replace(
        given.held_out.tokens.sidecar, has_loss_mask=True
    )
    with pytest.raises(NotApplicable, match="held-out documents are chats: name a text"):
        stdlib_bpb.load(given)


def test_bits_per_byte_are_total_bits_over_total_bytes(corpus):
    (task,), samples = stdlib_bpb.TASKS, stdlib_bpb.load(held_out(corpus))
    files = list(corpus.held_out().documents())
    tokens, size = sum(len(t) - 1 for _, t, _ in files), sum(n for _, _, n in files)
    assert scored(task, samples, knows_all) == pytest.approx(tokens / size, rel=1e-6)
    assert len(samples) == len(files)
    texts = [corpus.tokenizer().decode(t[1:].tolist()).encode() for _, t, _ in files]
    beside = stdlib_bpb.baselines(held_out(corpus))
    assert beside["gzip_bpb"] == 8 * sum(len(gzip.compress(t, 9)) for t in texts) / size
    xz = sum(len(lzma.compress(t, preset=9 | lzma.PRESET_EXTREME)) for t in texts)
    assert beside["xz_bpb"] == 8 * xz / size


def test_unigram_bits_are_smoothed_frequencies(corpus):
    counts_V = count_tokens(corpus.training(), 300)
    np.testing.assert_array_equal(counts_V, np.bincount(corpus.training().tokens, minlength=300))
    bits = unigram_bits(counts_V)
    assert (2.0**-bits).sum() == pytest.approx(1.0)
    assert bits[counts_V.argmax()] == bits.min()


def test_a_model_that_knows_the_file_completes_every_line(corpus):
    (task,), samples = line_completion.TASKS, line_completion.load(held_out(corpus))
    assert len(samples) > 10
    assert scored(task, samples, knows_all) == 1.0
    assert scored(task, samples, knows_nothing) == 0.0


def test_one_wrong_token_anywhere_in_the_line_fails_it(corpus):
    (task,), samples = line_completion.TASKS, line_completion.load(held_out(corpus))
    for offset in (-2, -1):  # the line's last token, and the line break after it

        def nearly(documents, offset=offset):
            scores = knows_all(documents)
            for score in scores:
                score.best_ids[offset] = 1 if score.best_ids[offset] != 1 else 2
            return scores

        assert scored(task, samples, nearly) == 0.0


def test_a_wrong_context_does_not_matter(corpus):
    """Only the line's own tokens decide."""

    def forgetful(documents):
        scores = knows_all(documents)
        for score in scores:
            score.best_ids[0] = 1
        return scores

    samples = line_completion.load(held_out(corpus))
    assert scored(line_completion.TASKS[0], samples, forgetful) == 1.0


def test_drawn_lines_are_whole_statements_of_functions(corpus):
    whole = held_out(corpus).held_out
    examples = line_completion.draw_examples(whole)
    tokenizer = corpus.tokenizer()
    for example in examples:
        answer = example.window[-example.num_answer - 1 : -1].tolist()
        line = tokenizer.decode(answer).strip()
        assert line.startswith(("total = ", "return total"))
        assert tokenizer.decode(example.window[-1:].tolist()).startswith("\n")
        assert len(example.window) <= 64 + 1
    places = [example.place for example in examples]
    again = line_completion.draw_examples(whole)
    assert places == [example.place for example in again]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("stdlib_bbp", "there is no task 'stdlib_bbp': did you mean stdlib_bpb?"),
        ("zzz", "there is no task 'zzz': --tasks list shows those there are"),
        ("bpb", "bpb is a family of tasks: name one of them, bpb:FOLDER"),
        ("bpb:nowhere", "bpb:nowhere names no folder and no file"),
        ("nowhere.jsonl", "nowhere.jsonl is missing"),
    ],
)
def test_a_name_that_is_no_task_is_refused(name, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        find_tasks([name])


def test_a_set_stands_for_its_tasks_and_a_task_comes_once():
    names = [task.name for task in find_tasks(["quick", "stdlib_bpb"])]
    assert names[:2] == ["stdlib_bpb", "line_completion"]
    assert len(set(names)) == len(names)
    shown = describe_tasks()
    assert all(task.description in shown for task in known_tasks().values())
