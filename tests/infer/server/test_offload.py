"""A small model behind the routes of a large one: who answers what."""

import dataclasses

import httpx
import numpy as np
import openai
import pytest

from infer.query_router import FEATURES, Report, Router
from infer.server.engine_thread import EngineThread
from infer.server.offload import Offload
from tests.infer.server.conftest import user
from tests.infer.server.scripted import ScriptedEngine, served

REPORT = Report(**{field.name: 0 for field in dataclasses.fields(Report)})
ROUTER = Router(
    small="tiny-small",
    weights=[-1.0] + [0.0] * (len(FEATURES) - 1),
    bias=0.0,
    means=[0.0] * len(FEATURES),
    scales=[1.0] * len(FEATURES),
    threshold=0.5,
    target=0.95,
    report=REPORT,
)


@pytest.fixture(scope="module")
def offloaded(tokenizer):
    """A server whose models say who they are; "hard" is hard, "broken" can't be looked at."""

    def features(prompt):
        text = tokenizer.decode(prompt, specials=True)
        if "broken" in text:
            raise RuntimeError("planted")
        return np.array([5.0 if "hard" in text else -5.0, *[0.0] * (len(FEATURES) - 1)])

    large, small = (
        ScriptedEngine(tokenizer, lambda request, said=said: tokenizer.encode(said))
        for said in ("LARGE", "SMALL")
    )
    offload = Offload(
        EngineThread(small, 4, 64), ROUTER, features, max_length=200, large_length=1024
    )
    with served(large, tokenizer, offload=offload) as made:
        yield made, offload


@pytest.fixture
def client(offloaded):
    server, _ = offloaded
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def answer(client, text, **more):
    made = client.chat.completions.create(model="tiny", messages=user(text), **more)
    return made.choices[0].message.content


def test_what_is_simple_goes_to_the_small_model(client, offloaded):
    server, offload = offloaded
    before = offload.num_small, offload.num_large
    assert answer(client, "what is simple") == "SMALL"
    assert answer(client, "what is hard") == "LARGE"
    assert answer(client, "again hard", max_tokens=3) == "LAR"
    stream = client.chat.completions.create(model="tiny", messages=user("simple"), stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "SMALL"
    assert (offload.num_small - before[0], offload.num_large - before[1]) == (2, 2)
    told = httpx.get(f"{server.url}/stats").json()["offload"]
    assert told["small_model"] == "tiny-small"
    assert told["call_share"] == offload.num_large / (offload.num_small + offload.num_large)


def test_several_answers_and_prompts_stay_together(client):
    made = client.chat.completions.create(model="tiny", messages=user("simple"), n=2)
    assert [choice.message.content for choice in made.choices] == ["SMALL", "SMALL"]
    made = client.completions.create(model="tiny", prompt=["simple", "hard"])
    assert [choice.text for choice in made.choices] == ["LARGE", "LARGE"]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("simple", {"logprobs": True}),
        ("simple", {"extra_body": {"expert_preference": ["code_generation"]}}),
        ("simple" * 40, {}),
        ("simple", {"max_tokens": 500}),
        ("simple but broken", {}),
    ],
    ids=["logprobs", "preference", "long prompt", "long text", "not looked at"],
)
def test_what_is_the_large_models_own_goes_there(client, text, more):
    assert answer(client, text, **({"max_tokens": 5} | more)) == "LARGE"


def test_a_small_engine_that_failed_is_not_asked(client, offloaded):
    _, offload = offloaded
    offload.small.failure = "planted"
    try:
        assert answer(client, "simple") == "LARGE"
    finally:
        offload.small.failure = None
    assert answer(client, "simple") == "SMALL"


def test_a_client_that_goes_frees_the_small_engine(tokenizer):
    small = ScriptedEngine(tokenizer, lambda r: tokenizer.encode("x" * 200), step_seconds=0.02)
    large = ScriptedEngine(tokenizer, lambda r: tokenizer.encode("LARGE"))
    offload = Offload(
        EngineThread(small, 4, 64), ROUTER, lambda prompt: np.full(len(FEATURES), -1.0), 1024, 1024
    )
    with (
        served(large, tokenizer, offload=offload) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="tiny", messages=user("a"), stream=True)
        next(iter(stream))
        stream.close()
        httpx.get(f"{server.url}/health")
        for _ in range(100):
            if small.cancelled:
                break
            httpx.get(f"{server.url}/health")
    assert small.cancelled
    assert not large.seen
