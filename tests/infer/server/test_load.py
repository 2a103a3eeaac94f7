"""Many clients at once: nobody's answer is lost, or another's."""

import asyncio
import random

import httpx
import pytest

from tests.infer.server.conftest import echoed, user
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

pytestmark = pytest.mark.slow
CLIENTS = 1000


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_tokenizer()
    return ScriptedEngine(tokenizer, echoed(tokenizer), max_rows=64)


@pytest.fixture(scope="module")
def server(engine):
    with served(engine, engine.tokenizer, most_waiting=CLIENTS) as made:
        yield made


def asked(url, ask, numbers=range(CLIENTS)):
    """What `ask` gives for each number, all at once."""

    async def run():
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
            return await asyncio.gather(*(ask(client, i) for i in numbers))

    return asyncio.run(run())


def test_a_thousand_at_once(server):
    async def ask(client, i):
        body = {"messages": user(f"say:I am {i}"), "stream": False}
        answer = await client.post("/v1/chat/completions", json=body)
        return answer.json()["choices"][0]["message"]["content"]

    assert asked(server.url, ask) == [f"I am {i}" for i in range(CLIENTS)]


def test_aborts_leave_nothing_behind(server, engine):
    """A third of the clients goes at some point, streams and others."""
    draw = random.Random(0)
    seconds = [draw.choice([None, None, draw.uniform(0, 1.0)]) for _ in range(CLIENTS)]

    async def ask(client, i):
        body = {"messages": user(f"say:I am {i}"), "stream": i % 2 == 0}
        try:
            async with asyncio.timeout(seconds[i]):
                answer = await client.post("/v1/chat/completions", json=body)
            return answer.status_code
        except TimeoutError:
            return None

    found = asked(server.url, ask)
    assert all(status == 200 for status, s in zip(found, seconds, strict=True) if s is None)
    deadline = 50
    while engine.live and deadline:
        asyncio.run(asyncio.sleep(0.1))
        deadline -= 1
    assert not engine.live
    assert server.service.engine.num_live == 0
    assert server.service.num_calls == 0
