"""What clients do wrong, and what goes wrong on the way: a clear answer, and the next one fine."""

import concurrent.futures
import json
import logging
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from infer.server.service import Limits
from tests.infer.server.conftest import echoed, user
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

ASK = {"messages": user("say:fine"), "max_tokens": 20}


def is_fine(url, **headers) -> bool:
    answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=headers, timeout=20)
    return answer.json()["choices"][0]["message"]["content"] == "fine"


def connection(url):
    parts = urlsplit(url)
    made = socket.create_connection((parts.hostname, parts.port), timeout=10)
    made.settimeout(10)
    return made


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"messages": NaN}', b'{"messages": [], "seed": Infinity}', b'{"n": 1%s}' % (b"0" * 9_000),
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1e30}',
        b'{"messages":[{"role":"user","content":"x"}],"n":1000000}',
        b'{"messages":[{"role":"user","content":"x"}],"stop":[%s"a"]}' % (b'"a",' * 99),
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":true}',
        b'{"messages":[{"role":"user","content":"x"}],"logit_bias":{"99999":1}, "n":"2"}',
    ],
)  # fmt: skip
def test_bodies_that_are_none(http, server, raw):
    answer = http.post("/v1/chat/completions", content=raw)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert answer.headers["x-request-id"]
    assert is_fine(server.url)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", "/pause", 403),
        ("POST", "/v1/../../etc/passwd", 404),
    ],
)
def test_routes_that_are_none(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_forms_of_other_sites_are_refused(http):
    answer = http.post("/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 415


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00" * 20, b"GET\r\n\r\n", b"\0" * 70_000])
def test_what_is_no_http(server, garbage):
    with connection(server.url) as made:
        made.sendall(garbage)
        answer = made.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"bad_http"' in answer
    assert is_fine(server.url)


def test_a_body_that_is_too_long_or_too_slow():
    tokenizer = byte_tokenizer()
    limits = Limits(max_body_bytes=10_000, body_seconds=0.3, header_seconds=0.3)
    with served(ScriptedEngine(tokenizer, echoed(tokenizer)), tokenizer, limits=limits) as made:
        body = json.dumps(ASK | {"user": "x" * 20_000}).encode()
        answer = httpx.post(f"{made.url}/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        chunks = (b" " * 1000 for _ in range(100))  # its length is not told
        answer = httpx.post(f"{made.url}/v1/chat/completions", content=chunks)
        assert answer.status_code == 413
        with connection(made.url) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with connection(made.url) as slow:
            slow.sendall(b"POST /v1/comp")
            assert slow.recv(1000) == b""
        assert is_fine(made.url)


def test_keys():
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, echoed(tokenizer))
    with served(engine, tokenizer, keys=["first", "second"]) as made:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}):
            answer = httpx.get(f"{made.url}/v1/models", headers=given)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{made.url}/metrics").status_code == 401
        assert {httpx.get(made.url + path).status_code for path in ("/health", "/ready", "/")} == {
            200
        }
        assert is_fine(made.url, authorization="Bearer second")
        assert is_fine(made.url, **{"x-api-key": "first"})
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{made.url}/v1", api_key="no").models.list()


@pytest.fixture
def slow():
    """An engine of two rows that takes its time, for texts without end."""
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: [70] * 400, max_rows=2, step_seconds=0.01)
    with served(engine, tokenizer, most_waiting=2) as made:
        yield made, engine


def test_a_full_queue_says_when_to_come_again(slow):
    made, engine = slow

    def ask(_):
        body = ASK | {"max_tokens": 60}
        return httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=30)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 4
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 8
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert not engine.live
    assert (
        'admission_rejections_total{model_name="tiny"} 8.0' in httpx.get(f"{made.url}/metrics").text
    )
    with pytest.raises(openai.BadRequestError, match="9 texts at once exceed"):
        openai.OpenAI(base_url=f"{made.url}/v1", api_key="x").completions.create(
            model="tiny", prompt="a", n=9
        )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(slow, stream):
    """While its text is generated, and while it waits for a row."""
    made, engine = slow
    body = json.dumps({"prompt": "a", "max_tokens": 300, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
    connections = [connection(made.url) for _ in range(3)]
    for each in connections:
        each.sendall(head.encode() + body)
    wait_until(lambda: len(engine.live) == 3)
    for each in connections:
        each.close()
    wait_until(lambda: not engine.live, 2.0)
    assert sorted(engine.cancelled) == [0, 1, 2]
    wait_until(lambda: made.service.engine.num_live == 0)
    assert made.service.num_calls == 0


def test_a_stream_that_is_closed_early(slow):
    made, engine = slow
    client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="x")
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=300, stream=True, n=2)
    next(iter(stream))
    stream.close()
    wait_until(lambda: not engine.live, 2.0)


def test_what_fails_midway_is_an_event_of_the_stream():
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: [*tokenizer.encode("half"), -1])
    with served(engine, tokenizer) as made:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join(next(stream).choices[0].text for _ in range(4)) == "half"
        with pytest.raises(openai.APIError, match="the logits are no numbers"):
            next(stream)
        with pytest.raises(openai.InternalServerError, match="the logits are no numbers"):
            client.completions.create(model="tiny", prompt="a")
        assert httpx.get(f"{made.url}/health").status_code == 200


def test_an_engine_that_dies_is_told_and_health_says_so():
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: 1 // 0)
    logging.getLogger("moesaic.server").addHandler(logging.NullHandler())
    with served(engine, tokenizer) as made:
        for _ in range(2):
            answer = httpx.post(f"{made.url}/v1/chat/completions", json=ASK)
            assert answer.status_code == 500
            assert answer.headers["x-should-retry"] == "false"
            assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert httpx.get(f"{made.url}/health").status_code == 500
        assert httpx.get(f"{made.url}/ready").status_code == 500


def test_a_server_that_stops_answers_what_is_under_way_and_nothing_new(slow):
    made, engine = slow
    body = {"prompt": "a", "max_tokens": 60}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(httpx.post, f"{made.url}/v1/completions", json=body, timeout=30)
        wait_until(lambda: len(engine.live) == 1)
        made._loop.call_soon_threadsafe(made.stopping.set)
        made.service.is_draining = True
        refused = httpx.post(f"{made.url}/v1/completions", json=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{made.url}/ready").status_code == 503
        assert httpx.get(f"{made.url}/health").status_code == 200
        assert under_way.result().json()["usage"]["completion_tokens"] == 60


def test_what_is_left_when_the_time_to_stop_is_over_gets_an_error():
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: [70] * 500, step_seconds=0.02)
    with served(engine, tokenizer) as made:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True)
        next(iter(stream))
        made._loop.call_soon_threadsafe(made.stopping.set)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_pings_keep_a_silent_stream_alive():
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: [70], step_seconds=0.3)
    limits = Limits(ping_seconds=0.1)
    with served(engine, tokenizer, limits=limits) as made:
        body = ASK | {"stream": True}
        text = httpx.post(f"{made.url}/v1/chat/completions", json=body).text
        assert text.count(": still working\n\n") >= 2
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="x")
        assert list(client.chat.completions.create(model="tiny", **body))


def test_pause_resume_and_other_weights():
    tokenizer = byte_tokenizer()
    first = ScriptedEngine(tokenizer, lambda request: tokenizer.encode("old"), step_seconds=0.01)
    second = ScriptedEngine(tokenizer, lambda request: tokenizer.encode("new"))

    def update(source):
        from configs.checks import UserError

        if source != "good":
            raise UserError(f"{source} is no folder")
        return lambda engine: second

    with (
        served(first, tokenizer, update=update) as made,
        concurrent.futures.ThreadPoolExecutor() as p,
    ):
        post = lambda path, body=None: httpx.post(made.url + path, json=body, timeout=20)  # noqa: E731
        assert post("/pause").json() == {"status": "paused"}
        waiting = p.submit(post, "/v1/completions", {"prompt": "a"})
        wait_until(lambda: len(first.live) == 1)
        time.sleep(0.05)
        assert first.said == {0: []}
        assert post("/resume").status_code == 200
        assert waiting.result().json()["choices"][0]["text"] == "old"
        assert post("/update_weights", {"source": "bad"}).status_code == 400
        under_way = p.submit(post, "/v1/completions", {"prompt": "a"})
        wait_until(lambda: len(first.seen) == 2)
        assert post("/update_weights", {"source": "good"}).json()["weights_version"] == 1
        assert under_way.result().json()["choices"][0]["text"] == "old"
        assert post("/v1/completions", {"prompt": "a"}).json()["choices"][0]["text"] == "new"


def test_the_log_has_no_prompts(server, caplog):
    logger = logging.getLogger("moesaic.server")
    logger.setLevel(logging.INFO)
    logger.propagate = True
    with caplog.at_level(logging.INFO, "moesaic.server"):
        headers = {"x-request-id": "mine-1"}
        ask = ASK | {"messages": user("say:secret")}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        wait_until(lambda: any("mine-1" in r.message for r in caplog.records))
    (line,) = [json.loads(r.message) for r in caplog.records if "mine-1" in r.message]
    assert (line["status"], line["path"]) == (200, "/v1/chat/completions")
    assert line["completion_tokens"] == len("secret")
    assert "secret" not in caplog.text
