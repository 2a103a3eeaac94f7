"""Requests as people send them, and how long each took: a load of its own for any OpenAI server.

Lengths are log-normal with the means of conversations that were shared (ShareGPT, as the vLLM paper
of 2023 counts them): many short ones and a few that are long.
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from data.tokenizers.public_tokenizer import PublicTokenizer

PROMPT_MEAN, ANSWER_MEAN = 161.0, 338.0
"""Tokens, of ShareGPT (Kwon et al. 2023, section 6.1)."""
SPREAD = 1.0
"""Of the logarithm of a length."""
SHORTEST = 4
SECONDS = 600.0
"""That a request may take."""


@dataclass(frozen=True)
class Ask:
    """A request: a prompt of text and how many tokens are to follow."""

    prompt: str
    max_tokens: int


@dataclass
class Answer:
    """How a request went."""

    seconds: float = 0.0
    """Until its end."""
    first_token: float = math.nan
    """Until its first text, in seconds."""
    gaps: list[float] = field(default_factory=list)
    """Between one piece of text and the next, in seconds."""
    tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Traffic:
    """How requests come: so many each second at random times, or from so many clients that wait."""

    rate: float | None = None
    clients: int | None = None


def draw_lengths(
    count: int, seed: int, *, prompt_mean: float, answer_mean: float, longest: int
) -> list[tuple[int, int]]:
    """Tokens of prompts and answers, each pair within `longest`."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        pair = [_drawn(draw, mean, longest // 2) for mean in (prompt_mean, answer_mean)]
        found.append((pair[0], pair[1]))
    return found


def _drawn(draw: np.random.Generator, mean: float, most: int) -> int:
    middle = math.log(mean) - SPREAD**2 / 2
    return int(np.clip(round(draw.lognormal(middle, SPREAD)), SHORTEST, max(most, SHORTEST)))


def make_asks(
    tokenizer: PublicTokenizer, text: str, lengths: Sequence[tuple[int, int]], seed: int
) -> list[Ask]:
    """Requests of these lengths: pieces of the text from random places, so that few begin alike."""
    ids, draw = tokenizer.encode(text, bos=False), np.random.default_rng(seed + 1)
    asks = []
    for prompt, answer in lengths:
        begin = int(draw.integers(0, max(len(ids) - prompt, 1)))
        asks.append(Ask(tokenizer.decode(ids[begin : begin + prompt]), answer))
    return asks


def run_load(
    url: str, asks: Sequence[Ask], traffic: Traffic, seed: int, extra: dict[str, Any]
) -> tuple[list[Answer], float]:
    """The answers, and the seconds from the first request to the last answer.

    Args:
      url: of the server, without /v1.
      extra: fields of the body, as a server wants them.
    """
    return asyncio.run(_run(url, asks, traffic, seed, extra))


async def _run(
    url: str, asks: Sequence[Ask], traffic: Traffic, seed: int, extra: dict[str, Any]
) -> tuple[list[Answer], float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        began = time.perf_counter()
        if traffic.rate is not None:
            draw = np.random.default_rng(seed + 2)
            times = np.cumsum(draw.exponential(1 / traffic.rate, len(asks)))

            async def at(ask: Ask, moment: float) -> Answer:
                await asyncio.sleep(max(began + moment - time.perf_counter(), 0))
                return await answer(client, ask, extra)

            pairs = zip(asks, times.tolist(), strict=True)
            made = await asyncio.gather(*(at(ask, moment) for ask, moment in pairs))
        else:
            waiting, found = list(enumerate(asks))[::-1], {}

            async def work() -> None:
                while waiting:
                    i, ask = waiting.pop()
                    found[i] = await answer(client, ask, extra)

            await asyncio.gather(*(work() for _ in range(traffic.clients or 1)))
            made = [found[i] for i in range(len(asks))]
        return list(made), time.perf_counter() - began


async def answer(client: httpx.AsyncClient, ask: Ask, extra: dict[str, Any]) -> Answer:
    """One request's answer, streamed."""
    body = {"prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0.0} | extra
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    made, began = Answer(), time.perf_counter()
    before, pieces = began, 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                made.error = f"{response.status_code} {response.text[:200]}"
                return made
            async for event in _events(response):
                if "error" in event:
                    made.error = str(event["error"])[:200]
                usage, choices = event.get("usage"), event.get("choices")
                if usage:
                    made.tokens = usage["completion_tokens"]
                    details = usage.get("prompt_tokens_details") or {}
                    made.cached_tokens = details.get("cached_tokens") or 0
                if not choices or not choices[0].get("text"):
                    continue
                now, pieces = time.perf_counter(), pieces + 1
                if pieces == 1:
                    made.first_token = now - began
                else:
                    made.gaps.append(now - before)
                before = now
    except httpx.HTTPError as error:
        made.error = f"{type(error).__name__}: {error}"
    made.seconds = time.perf_counter() - began
    made.tokens = made.tokens or pieces  # of servers that tell no usage in a stream
    return made


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
