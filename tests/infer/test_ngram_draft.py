"""Drafts from the text's own tokens: the same text in fewer steps, whatever is asked of it."""

import dataclasses

import numpy as np
import pytest

from configs.checks import UserError
from infer.engine import Engine, EngineOptions, Request
from infer.engine.drafting import Drafting
from infer.engine.sequence import TokenSequence
from infer.ngram_draft import NgramDraft, NgramIndex
from infer.sampling import Sampling
from tests.infer import test_engine_answers, test_engine_prefixes
from tests.infer.test_engine_answers import CONFIG, MODEL, NEVER, VARIABLES, Multiples, served

DRAFT = NgramDraft(length=3, longest=3, shortest=1)
OPTIONS = test_engine_answers.OPTIONS
CYCLE = [3, 8, 21, 5] * 6
PROMPTS = [CYCLE, [*CYCLE[:9], 40, *CYCLE[:6]], test_engine_answers.PROMPTS[1]]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whether drafts pay is another test's."""
    monkeypatch.setattr(Drafting, "_pays", lambda *_: True)


@pytest.fixture(scope="module")
def plain():
    return Engine(MODEL, VARIABLES, OPTIONS)


@pytest.fixture(scope="module")
def drafted():
    return Engine(MODEL, VARIABLES, dataclasses.replace(OPTIONS, draft=DRAFT))


def naive(tokens, most):
    """The longest of the last tokens that stood before, and what followed where they last did."""
    for size in (3, 2, 1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[len(tokens) - size :]:
                found = tokens[begin + size :]
                return (found * most)[:most]
    return []


def test_the_index_finds_what_a_search_finds():
    random = np.random.RandomState(0)
    index, tokens = NgramIndex(DRAFT), []
    for _ in range(300):
        new = random.randint(0, 6, random.randint(1, 4)).tolist()
        index.extend(new)
        tokens += new
        most = int(random.randint(1, 4))
        assert index.propose(most) == naive(tokens, most)
    assert NgramIndex(DRAFT).propose(3) == []
    assert index.propose(0) == []


REPEATS = Sampling(logit_bias=NEVER | {3: 6.0, 8: 5.8})
"""Of the same few tokens, so that drafts hold at times."""
HOT = Sampling(1.0, seed=4, frequency_penalty=0.3, logit_bias=NEVER | {3: 5.0, 8: 5.0})


@pytest.mark.parametrize("sampling", [Sampling(), REPEATS, HOT], ids=["greedy", "biased", "drawn"])
@pytest.mark.thinned(2)
@pytest.mark.thinned(2)
def test_the_text_is_the_same_in_fewer_steps(plain, drafted, sampling):
    """At max_length, too, and with penalties that count what was drafted before."""
    requests = [Request(p, 96 - len(p), sampling=sampling, num_logprobs=1) for p in PROMPTS]
    steps = {}
    answers = {}
    for name, engine in (("plain", plain), ("drafted", drafted)):
        answers[name] = served(
            engine, requests, lambda step, _, name=name: steps.__setitem__(name, step)
        )
    for one, other in zip(answers["plain"], answers["drafted"], strict=True):
        assert one.tokens == other.tokens
        assert (one.reason, len(one.logprobs)) == (other.reason, len(other.logprobs))
        nats = [[x.logprob for x in answer.logprobs] for answer in (one, other)]
        np.testing.assert_allclose(*nats, atol=1e-4)
    if sampling == REPEATS:
        assert steps["drafted"] < 0.7 * steps["plain"]


def test_stops_inside_a_draft_end_the_text(plain, drafted):
    text = served(plain, [Request(CYCLE, 40, sampling=REPEATS)])[0].tokens
    stop = frozenset({text[-1]})
    asked = [
        Request(CYCLE, 40, sampling=REPEATS, stop_ids=stop),
        Request(CYCLE, 40, sampling=REPEATS, is_stopped=lambda tokens: len(tokens) == 17),
    ]
    ends = [[(a.tokens, a.reason) for a in served(e, asked)] for e in (plain, drafted)]
    assert ends[0] == ends[1]


class Cycle(Multiples):
    """Multiples of 3 and of 4 in turn: what may come depends on what was accepted."""

    def allowed_V(self):
        return np.arange(CONFIG.vocab_size) % (3 + len(self.accepted) % 2) == 0

    def accept(self, token):
        assert token % (3 + len(self.accepted) % 2) == 0
        self.accepted.append(token)


def test_constraints_roll_back_with_rejected_drafts(plain, drafted):
    made = []
    for engine in (plain, drafted):
        constraints = [Cycle(1), Cycle(1)]
        requests = [
            Request(p, 30, sampling=REPEATS, constraint=c)
            for p, c in zip(PROMPTS[:2], constraints, strict=True)
        ]
        answers = served(engine, requests)
        assert [a.tokens for a in answers] == [c.accepted for c in constraints]
        made.append([a.tokens for a in answers])
    assert made[0] == made[1]


def test_texts_read_once_more_go_on_with_drafts(plain, drafted):
    """Where pages run out under drafts."""
    before = drafted.stats().preemptions
    requests = [Request(p[:12], 40, sampling=HOT) for p in PROMPTS]
    texts = [a.tokens for a in served(drafted, requests)]
    assert drafted.stats().preemptions > before
    alone = [served(plain, [request])[0].tokens for request in requests]
    assert texts == alone
    assert drafted.stats().free_pages == 13


def test_drafts_that_do_not_pay_are_left(monkeypatch):
    """And tried again now and then."""
    monkeypatch.undo()
    drafting = Drafting(DRAFT)
    sequence = TokenSequence(0, Request(CYCLE, 500), 32, b"", text=[3], read=24)
    tries = []
    for _ in range(200):
        drafts = drafting.propose([sequence])
        tries.append(bool(drafts))
        drafting.learn(2.0 if drafts else 1.0, drafts, {0: 2})
    assert sum(tries[10:]) == 3
    for _ in range(20):
        drafts = drafting.propose([sequence])
        drafting.learn(1.1 if drafts else 1.0, drafts, {0: 4})
    drafting._drafted.mean = 1.1
    assert drafting.propose([sequence])


def test_states_that_can_not_be_rewound_are_refused():
    model = test_engine_prefixes.RECURRENT
    with pytest.raises(UserError, match="drafts can't be taken back"):
        Engine(model, {}, EngineOptions(draft=DRAFT))
    with pytest.raises(UserError, match=r"draft.shortest=3 must not exceed draft.longest=2"):
        NgramDraft(shortest=3, longest=2)
