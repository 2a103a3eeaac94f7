"""The client package against a server on a real socket, and against one that misbehaves."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest

import deepseek
from deepseek import AsyncV3_1Client, V3_1Client
from tests.infer.server.conftest import TEXT, echoed
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

SDK = Path(__file__).resolve().parents[2] / "sdk"


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_tokenizer()
    return ScriptedEngine(tokenizer, echoed(tokenizer))


@pytest.fixture(scope="module")
def server(engine):
    with served(engine, engine.tokenizer, keys=["KEY"]) as made:
        yield made


@pytest.fixture
def client(server):
    with V3_1Client(api_key="KEY", endpoint=server.url) as made:
        yield made


def test_the_snippet_of_the_article(server, engine):
    client = V3_1Client(api_key="KEY", endpoint=server.url)
    answer = client.generate(
        prompt="Write a sort: say:def sort(x): ...",
        max_tokens=200,
        temperature=0.7,
        expert_preference=["code_generation", "algorithm_design"],
    )
    assert answer.generated_text == "def sort(x): ..."
    request = engine.seen[-1]
    assert (request.max_new_tokens, request.sampling.temperature) == (200, 0.7)
    assert request.preference["layer_0"].tolist() == [0, 1]
    assert (answer.finish_reason, answer.model) == ("stop", "tiny")
    assert answer.usage.completion_tokens == len("def sort(x): ...")
    assert answer.usage.cached_tokens == answer.usage.prompt_tokens // 2
    assert answer.request_id.startswith("req_")
    assert client.models() == ["tiny"]


def test_a_stream_is_the_whole_text(client):
    stream = client.stream("go", max_tokens=100)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == stream.generated_text == TEXT
    assert stream.generation.usage.completion_tokens == len(TEXT.encode())
    assert stream.generation.finish_reason == "stop"


def test_a_session_remembers(client, engine):
    session = client.session(system="Be brief.", max_tokens=50)
    assert session.send("say:one").generated_text == "one"
    assert "".join(session.stream("say:two")) == "two"
    assert [m["content"] for m in session.messages] == [
        "Be brief.",
        "say:one",
        "one",
        "say:two",
        "two",
    ]
    assert "Be brief." in engine.tokenizer.decode(engine.seen[-1].prompt)
    with pytest.raises(deepseek.BadRequest):
        session.send("say:three", temperature=9)
    assert len(session.messages) == 5


def test_the_asynchronous_client(server):
    async def ask():
        async with AsyncV3_1Client(api_key="KEY", endpoint=f"{server.url}/v1/") as client:
            answers = await asyncio.gather(*(client.generate(f"say:{i}") for i in range(4)))
            streamed = [piece async for piece in client.stream("go", max_tokens=100)]
            session = client.session()
            first = await session.send("say:one")
            second = [piece async for piece in session.stream("say:two")]
            assert await client.models() == ["tiny"]
            return answers, "".join(streamed), first, "".join(second), len(session.messages)

    answers, streamed, first, second, count = asyncio.run(ask())
    assert [answer.generated_text for answer in answers] == list("0123")
    assert (streamed, str(first), second, count) == (TEXT, "one", "two", 4)


@pytest.mark.parametrize(
    ("key", "settings", "kind", "sentence"),
    [
        ("KEY", {"temperature": -1}, deepseek.BadRequest, "temperature"),
        ("KEY", {"expert_preference": ["cooking"]}, deepseek.BadRequest, "unknown domain"),
        ("KEY", {"extra": {"model": "other"}}, deepseek.NotFound, "no model 'other'"),
        ("no", {}, deepseek.AuthenticationFailed, "API key"),
    ],
)
def test_errors_have_classes(server, key, settings, kind, sentence):
    with (
        V3_1Client(api_key=key, endpoint=server.url) as client,
        pytest.raises(kind, match=sentence) as caught,
    ):
        client.generate("a", **settings)
    assert caught.value.request_id


def misbehaving(*answers, **settings):
    """A client whose server gives these answers in turn, and the requests it got."""
    given, seen = list(answers), []

    def answer(request):
        seen.append(request)
        made = given.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    http = httpx.Client(transport=httpx.MockTransport(answer))
    return V3_1Client(endpoint="http://test", http_client=http, **settings), seen


FINE = {"choices": [{"text": "fine", "finish_reason": "stop"}], "model": "m"}
FULL = {"error": {"message": "full", "code": "queue_full"}}


def test_a_server_without_room_is_asked_again_when_it_says(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    full = httpx.Response(429, json=FULL, headers={"retry-after": "7"})
    client, seen = misbehaving(full, httpx.ConnectError("no"), httpx.Response(200, json=FINE))
    assert client.generate("a").generated_text == "fine"
    assert len(seen) == 3
    assert waited[0] == 7
    assert 0.5 <= waited[1] <= 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"status_code": 500, "headers": {"x-should-retry": "false"}}, deepseek.ServerError),
        ({"status_code": 400, "text": "no JSON"}, deepseek.BadRequest),
        ({"status_code": 403, "json": FULL}, deepseek.PermissionDenied),
    ],
)
def test_what_another_try_does_not_mend_is_not_tried_again(answer, kind):
    client, seen = misbehaving(httpx.Response(**answer))
    with pytest.raises(kind):
        client.generate("a")
    assert len(seen) == 1


def test_tries_end(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client, seen = misbehaving(*(httpx.Response(429, json=FULL) for _ in range(3)))
    with pytest.raises(deepseek.RateLimited, match="full"):
        client.generate("a")
    assert len(seen) == 3
    client, _ = misbehaving(httpx.ReadTimeout("slow"), max_retries=0)
    with pytest.raises(deepseek.TimedOut):
        client.generate("a")


def test_a_stream_that_breaks_keeps_what_had_come():
    half = 'data: {"choices": [{"text": "half"}]}\n\n'
    client, _ = misbehaving(httpx.Response(200, text=half))
    with pytest.raises(deepseek.StreamBroken) as caught:
        list(client.stream("a"))
    assert caught.value.text == "half"
    client, _ = misbehaving(
        httpx.Response(200, text=half + 'data: {"error": {"message": "NaN"}}\n\n')
    )
    with pytest.raises(deepseek.ServerError, match="NaN"):
        list(client.stream("a"))


def test_it_needs_httpx_alone():
    imports = set()
    for path in (SDK / "deepseek").glob("*.py"):
        imports |= set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    outside = imports - {"__future__", "deepseek"} - set(__import__("sys").stdlib_module_names)
    assert outside == {"httpx"}
