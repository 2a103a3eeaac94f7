"""What an engine says of a text beside its tokens: why it ended, how likely it was, what went
wrong; and that pages and rows are as before, whoever came and went."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.checks import UserError
from infer.engine import Constraint, ConstraintFailed, Engine, EngineOptions, Request
from infer.logits import full_logits
from infer.sampling import Sampling
from model.transformer import Transformer
from tests.infer import test_engine
from tests.probes import drawn

CONFIG = dataclasses.replace(test_engine.CONFIG, context_length=256, tie_embeddings=False)
MODEL, VARIABLES = Transformer(CONFIG), drawn(CONFIG, seed=3)
POISON = 299
"""A token whose embedding is not a number; its logit is 0, which is never the best."""
VARIABLES["params"]["embedding"] = VARIABLES["params"]["embedding"].at[POISON].set(np.nan)
VARIABLES["params"]["output"] = VARIABLES["params"]["output"].at[:, POISON].set(0)
NEVER = {POISON: -100.0}
OPTIONS = EngineOptions(
    max_rows=3, max_length=96, piece=32, block=32, num_pages=14, page_size=8, prefix_cache=True
)
RANDOM = np.random.RandomState(1)
PROMPTS = [RANDOM.randint(1, 290, n).tolist() for n in (5, 30, 61, 17)]


def new_engine(**changes) -> Engine:
    return Engine(MODEL, VARIABLES, dataclasses.replace(OPTIONS, **changes))


class Answer:
    """All that was emitted for one request."""

    def __init__(self):
        self.tokens, self.logprobs, self.prompt_logprobs = [], [], None
        self.reason = self.error = None

    def add(self, emitted):
        assert self.reason is None, "nothing follows the end"
        assert emitted.is_done == (emitted.reason is not None)
        self.tokens += emitted.tokens
        self.logprobs += emitted.logprobs
        self.prompt_logprobs = self.prompt_logprobs or emitted.prompt_logprobs
        self.reason, self.error = emitted.reason, emitted.error


def served(engine, requests, on_step=lambda *_: None):
    """The answers to requests that all come at once."""
    answers = {engine.add(request): Answer() for request in requests}
    step = 0
    while engine.has_work():
        for emitted in engine.step():
            answers[emitted.request].add(emitted)
        engine._memory.pool.check()
        step += 1
        on_step(step, answers)
    return list(answers.values())


def whole_nats(tokens) -> np.ndarray:
    """Log-probabilities after each token, of one pass; all have one length, and none sees what
    follows it."""
    padded = [*tokens, *[0] * (OPTIONS.max_length - len(tokens))]
    return np.asarray(jax.nn.log_softmax(full_logits(MODEL, VARIABLES, padded)))[: len(tokens)]


@pytest.fixture(scope="module")
def engine():
    return new_engine()


@pytest.fixture(scope="module")
def plain(engine):
    return served(engine, [Request(p, 12) for p in PROMPTS])


def test_reasons(engine, plain):
    text = plain[0].tokens
    asked = [
        Request(PROMPTS[0], 12),
        Request(PROMPTS[0], 12, stop_ids=frozenset({text[4]})),
        Request(PROMPTS[0], 12, is_stopped=lambda tokens: len(tokens) == 3),
    ]
    made = served(engine, asked)
    assert [a.reason for a in made] == ["length", "stop", "stopped"]
    assert [a.tokens for a in made] == [text, text[: text.index(text[4])], text[:3]]


def test_log_probabilities_are_those_of_the_whole_model(engine):
    """Of each new token and the best ones, beside one pass over prompt and text; temperature and
    bias change what is chosen, not what is said of it."""
    hot = Sampling(2.0, seed=5, logit_bias=NEVER | {7: 3.0})
    requests = [Request(p, 12, sampling=hot, num_logprobs=4) for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, served(engine, requests), strict=True):
        nats_LV = whole_nats([*prompt, *answer.tokens])[len(prompt) - 1 :]
        assert [x.token for x in answer.logprobs] == answer.tokens
        for given, nats_V in zip(answer.logprobs, nats_LV[:-1], strict=True):
            assert given.logprob == pytest.approx(nats_V[given.token], abs=1e-4)
            best = np.sort(nats_V)[::-1][:4]
            np.testing.assert_allclose([nats for _, nats in given.top], best, atol=1e-4)
            np.testing.assert_allclose([nats_V[t] for t, _ in given.top], best, atol=1e-4)


def test_prompts_are_scored_in_pieces_as_in_one(engine):
    """In blocks cut by other prompts' shares, found by nobody before or by all."""
    requests = [Request(p, 2, num_logprobs=2, prompt_logprobs=True) for p in PROMPTS]
    together = served(engine, requests)
    for prompt, request, answer in zip(PROMPTS, requests, together, strict=True):
        first, *scores = answer.prompt_logprobs
        nats_LV = whole_nats(prompt)
        assert first is None
        assert [x.token for x in scores] == list(prompt[1:])
        for given, nats_V in zip(scores, nats_LV[:-1], strict=True):
            assert given.logprob == pytest.approx(nats_V[given.token], abs=1e-4)
            assert given.top[0][1] == pytest.approx(nats_V.max(), abs=1e-4)
        alone = served(engine, [request])[0]
        assert alone.prompt_logprobs == answer.prompt_logprobs
        assert alone.tokens == answer.tokens


def test_numbers_that_are_none_end_their_request_alone(engine, plain):
    poisoned = [*PROMPTS[1][:20], POISON, *PROMPTS[1][20:]]
    requests = [Request(PROMPTS[0], 12), Request(poisoned, 12), Request(PROMPTS[2], 12)]
    made = served(engine, requests)
    assert made[1].reason == "error"
    assert made[1].tokens == []
    assert "not finite" in made[1].error
    assert [made[0].tokens, made[2].tokens] == [plain[0].tokens, plain[2].tokens]
    again = served(engine, [Request(poisoned[:20] + PROMPTS[1][20:], 12)])[0]
    assert again.tokens == plain[1].tokens


def test_a_short_prompt_is_not_behind_a_long_one(engine):
    """It has its first token after the first step, and the long one is read on."""
    long, short = engine.add(Request(PROMPTS[2][::-1], 2)), engine.add(Request([4, 5], 2))
    first = [e.request for e in engine.step()]
    assert set(first) == {short}
    later = [e.request for _ in range(2) for e in engine.step()]
    assert set(later) == {long}
    assert not engine.has_work()


class Multiples(Constraint):
    """Tokens that `step` divides; fails after so many."""

    def __init__(self, step, fails_after=99):
        self.step, self.fails_after, self.accepted = step, fails_after, []

    def allowed_V(self):
        return None if self.step == 1 else np.arange(CONFIG.vocab_size) % self.step == 0

    def accept(self, token):
        self.accepted.append(token)
        if len(self.accepted) > self.fails_after:
            raise ConstraintFailed("it can't go on")

    def rollback(self, n):
        del self.accepted[len(self.accepted) - n :]


def test_constraints_choose_among_what_they_allow(engine, plain):
    """The best of the allowed ones, by the logits; neighbours are free."""
    constraint = Multiples(7)
    requests = [Request(PROMPTS[0], 12, constraint=constraint), Request(PROMPTS[1], 12)]
    bound, free = served(engine, requests)
    assert bound.tokens == constraint.accepted
    assert free.tokens == plain[1].tokens
    nats_LV = whole_nats([*PROMPTS[0], *bound.tokens])
    for token, nats_V in zip(bound.tokens, nats_LV[len(PROMPTS[0]) - 1 :], strict=False):
        assert token == 7 * nats_V[::7].argmax()


@pytest.mark.parametrize(
    ("constraint", "tokens", "error"),
    [(Multiples(1, fails_after=3), 3, "it can't go on"), (Multiples(7), 0, "allows no token")],
)
def test_a_constraint_that_fails_ends_the_text(engine, constraint, tokens, error):
    if not tokens:
        constraint.allowed_V = lambda: np.zeros(CONFIG.vocab_size, bool)
    made = served(engine, [Request(PROMPTS[0], 12, constraint=constraint)])[0]
    assert (made.reason, len(made.tokens)) == ("error", tokens)
    assert error in made.error


@pytest.mark.parametrize("at", [0, 1, 3, 9])
def test_cancelled_waiting_reading_writing_or_ended(engine, plain, at):
    """Its row and pages are another's at once."""
    before = engine.stats().free_pages
    requests = [Request(PROMPTS[i], 12) for i in (2, 0, 1, 3)]

    def cancel(step, answers):
        if step == at:
            engine.cancel(min(answers))
            engine.cancel(10**6)

    if at == 0:
        numbers = [engine.add(Request(PROMPTS[3], 2))]
        engine.cancel(numbers[0])
        assert [(e.request, e.reason) for e in engine.step()] == [(numbers[0], "cancelled")]
    made = served(engine, requests, cancel)
    assert [a.tokens for a in made[1:]] == [plain[i].tokens for i in (0, 1, 3)]
    assert made[0].reason == ("cancelled" if at else "length")
    assert made[0].tokens == plain[2].tokens[: len(made[0].tokens)]
    assert engine.stats().free_pages == before == OPTIONS.num_pages - 1


def test_pages_that_run_out_are_the_youngest_ones_loss(engine):
    """Texts that are read again as they were written go on as they would have."""
    before = engine.stats().preemptions
    asked = [
        Request(PROMPTS[i], 30, sampling=Sampling(1.0, frequency_penalty=0.5, logit_bias=NEVER))
        for i in (0, 1, 3)
    ]
    made = served(engine, asked)
    preemptions = engine.stats().preemptions
    assert preemptions > before
    alone = [served(engine, [request])[0] for request in asked]
    assert [a.tokens for a in made] == [a.tokens for a in alone]
    assert engine.stats().preemptions == preemptions


def soak(count: int, seed: int) -> None:
    """Requests that share beginnings, of which a third is cancelled at random."""
    engine, random = new_engine(), np.random.RandomState(seed)
    waiting, alive, ended = list(range(count)), [], 0
    while waiting or engine.has_work():
        for _ in range(min(len(waiting), random.randint(0, 3))):
            prompt = [*PROMPTS[2][: random.randint(1, 50)], *random.randint(1, 290, 4).tolist()]
            new, salt = int(random.randint(1, 8)), str(random.randint(2))
            alive.append(engine.add(Request(prompt, new, cache_salt=salt)))
            waiting.pop()
        if alive and random.rand() < 0.3:
            engine.cancel(int(random.choice(alive)))
        for emitted in engine.step():
            if emitted.is_done:
                alive.remove(emitted.request)
                ended += 1
        engine._memory.pool.check()
    stats = engine.stats()
    assert (ended, stats.running, stats.waiting, stats.free_pages) == (count, 0, 0, 13)
    assert 0 < stats.prefix_hits < stats.prefix_queries
    assert not engine._memory._under_way


def test_two_hundred_requests_leave_the_pages_as_they_were():
    soak(200, seed=0)


@pytest.mark.slow
def test_two_thousand_requests_leave_the_pages_as_they_were():
    soak(2000, seed=1)


def test_nothing_is_compiled_after_the_warm_up():
    """Whatever the settings; a mixture, whose experts a request may prefer. With weights that were
    put on a device, as those of a file are."""
    variables = jax.device_put(VARIABLES, jax.devices()[0])
    engine = Engine(MODEL, variables, dataclasses.replace(OPTIONS, max_rows=2))
    told, compiled = [], []
    engine.warm_up(lambda done, total: told.append((done, total)))
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == 2
    requests = [
        Request(PROMPTS[0], 3),
        Request(PROMPTS[1], 9, sampling=Sampling(0.7, top_k=5, top_p=0.9, min_p=0.1)),
        Request(PROMPTS[2], 4, num_logprobs=3, prompt_logprobs=True),
        Request(PROMPTS[2], 4, constraint=Multiples(3), cache_salt="of another"),
        Request(PROMPTS[3], 4, preference={"layer_0": np.ones((1, 1, 8), np.float32)}),
        Request(PROMPTS[2], 30, sampling=Sampling(repetition_penalty=1.2, logit_bias={3: 1.0})),
    ]

    def listen(event, seconds, **_):
        if "compile" in event:
            compiled.append((event, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert compiled, "the listener hears compilations"
        compiled.clear()
        served(engine, requests)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_can_not_be_answered_is_refused(engine):
    wrong = {"layer_7": np.zeros((1, 1, 8), np.float32)}
    for changes, sentence in (
        ({"num_logprobs": 21}, r"num_logprobs=21 must lie in \[0, 20\]"),
        ({"preference": wrong}, "names layer_7, and the layers with experts are layer_0, layer_1"),
    ):
        with pytest.raises(UserError, match=sentence):
            engine.add(Request(PROMPTS[0], 2, **changes))
