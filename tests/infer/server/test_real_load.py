"""A thousand clients of a real model at once, and two thousand of which many go again."""

import asyncio
import gc
import json
import random
import time
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest

from infer.engine import Request
from infer.sampling import Sampling
from tests.infer.server.kinds import NEVER, bias, kind_of, run, served_kind
from tests.infer.server.test_load import CLIENTS, asked

pytestmark = pytest.mark.slow
ROWS, LENGTH = 16, 128
SMALL = {"max_rows": ROWS, "max_length": LENGTH}
SHARED = np.random.RandomState(9).randint(1, 250, 70).tolist()


def prompt_of(i: int) -> list[int]:
    """A third of them begin alike, so that prefixes are found."""
    draw = np.random.RandomState(i)
    own = draw.randint(1, 250, draw.randint(1, 50)).tolist()
    return [*SHARED, *own] if i % 3 == 0 else own


def new_of(i: int) -> int:
    return 2 + i % 7


def body_of(i: int) -> dict:
    return {
        "prompt": prompt_of(i),
        "max_tokens": new_of(i),
        "temperature": 0.8,
        "seed": i,
        "logprobs": 0,
        "ignore_eos": True,
        "logit_bias": bias(),
        "stream": i % 2 == 0,
    }


async def nats_of(client: httpx.AsyncClient, i: int) -> list[float]:
    """The log-probabilities of a text, which tell it from others to the last bit."""
    body = body_of(i)
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    lines = [x.removeprefix("data: ") for x in answer.text.splitlines() if x.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    return [nats for c in choices if c["logprobs"] for nats in c["logprobs"]["token_logprobs"]]


@pytest.mark.parametrize(("name", "clients"), [("windowed", CLIENTS), ("recurrent", 100)])
def test_a_thousand_at_once_say_what_each_says_alone(name, clients):
    """None lost, none mixed, pages conserved: by log-probabilities, bit for bit."""
    kind = kind_of(name, **SMALL)
    with served_kind(kind, most_waiting=CLIENTS) as made:
        found = asked(made.made.url, nats_of, range(clients))
        made.complete("z", max_tokens=1)
        stats = made.stats()
    assert (stats["running"], stats["waiting"], stats["free_pages"]) == (0, 0, kind.free_pages)
    assert stats["prefix_hits"] > 0
    for i, nats in enumerate(found):
        sampling = Sampling(0.8, seed=i, logit_bias=NEVER)
        alone = run(kind.plain, [Request(prompt_of(i), new_of(i), sampling, num_logprobs=0)])[0]
        assert nats == alone.nats, i


def memory() -> tuple[int, int]:
    """Bytes of arrays on the device, and resident ones of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sum(x.nbytes for x in jax.live_arrays()), pages * 4096


@pytest.mark.parametrize("name", ["windowed"])
def test_two_thousand_of_which_half_go_leave_pages_and_memory_as_before(name):
    kind, draw = kind_of(name, **SMALL, state_bytes=1 << 20), random.Random(0)

    async def ask(client, i):
        seconds = draw.choice([None, draw.uniform(0, 0.3)])
        try:
            async with asyncio.timeout(seconds):
                await nats_of(client, i)
            return "answered"
        except TimeoutError:
            return "gone" if seconds is not None else "lost"

    with served_kind(kind, most_waiting=CLIENTS) as made:
        ended, before = [], (0, 0)
        for batch in range(0, 2400, 100):
            ended += asked(made.made.url, ask, range(batch, batch + 100))
            if batch == 300:  # programs are compiled, caches full
                before = memory()
        end = time.monotonic() + 30
        while made.made.service.engine.num_live or made.made.service.num_calls:
            assert time.monotonic() < end
            time.sleep(0.05)
        made.complete("z", max_tokens=1)
        stats, after = made.stats(), memory()
    assert set(ended) == {"answered", "gone"}
    assert min(ended.count("answered"), ended.count("gone")) > 300
    assert (stats["running"], stats["waiting"], stats["free_pages"]) == (0, 0, kind.free_pages)
    assert after[0] <= before[0] + (1 << 16)
    assert after[1] < before[1] + (16 << 20)
