"""What the routes share: the model, its engine's thread, metrics, bounds."""

import asyncio
import base64
import contextlib
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel

from infer.engine import Engine, Request, TokenLogprobs
from infer.server.engine_thread import EngineThread, Stream
from infer.server.errors import ApiError
from infer.server.metrics import Metrics, RequestTimes
from infer.server.offload import Offload
from infer.server.plan import TextPlan
from infer.server.reply_text import Shown
from infer.server.served_model import ServedModel


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server, and for how long."""

    max_body_bytes: int = 32 * 1024 * 1024
    body_seconds: float = 60.0
    """For a body to come, whole."""
    header_seconds: float = 20.0
    """For the head of a request to come; also how long a connection may say nothing at first."""
    ping_seconds: float = 15.0
    """A stream without news says so this often, that no proxy takes it for dead."""


Update = Callable[[str], Callable[[Engine], Engine]]
"""Reads another model's weights, and says how to make an engine with them of the one there is."""


@dataclass(eq=False)
class Service:
    """One model, served."""

    model: ServedModel
    engine: EngineThread
    metrics: Metrics
    limits: Limits = Limits()
    update: Update | None = None
    """None: /pause, /resume and /update_weights are not offered."""
    embed: Callable[[Sequence[int]], Any] | None = None
    """The vector of a text's tokens; called on the engine's thread."""
    offload: Offload | None = None
    """A small model that answers what is simple; None: there is none."""
    is_ready: bool = False
    is_draining: bool = False
    num_calls: int = 0
    """Requests over HTTP that are being answered, streams to their end."""

    @property
    def engines(self) -> tuple[EngineThread, ...]:
        """All that answer."""
        return (self.engine,) if self.offload is None else (self.engine, self.offload.small)

    def check_open(self) -> None:
        """
        Raises:
          ApiError: the model is not there yet, or the server is about to stop.
        """
        if self.is_draining:
            raise ApiError(503, "the server is stopping: ask another one", retry_after=5)
        if not self.is_ready:
            raise ApiError(503, "the model is not ready yet: try again later", retry_after=5)

    @contextlib.asynccontextmanager
    async def answers(
        self, plans: Sequence[TextPlan], requests: Sequence[Request]
    ) -> AsyncIterator[list["Answer"]]:
        """Answers to the requests, as many to each plan; what has not ended afterwards is
        cancelled.

        Raises:
          ApiError: they can't be served, or not now.
        """
        self.check_open()
        began = time.monotonic()
        engine = self.engine
        if self.offload is not None:
            engine, requests = await self.offload.choose(requests, engine)
        streams = await engine.submit(requests)
        each = len(requests) // len(plans)
        try:
            yield [
                Answer(self, plans[i // each], stream, RequestTimes(self.metrics, began))
                for i, stream in enumerate(streams)
            ]
        finally:
            for stream in streams:
                stream.close()


@dataclass(frozen=True)
class Piece:
    """What an answer says next."""

    text: str = ""
    reasoning: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    """"stop" or "length" with the last piece."""


@dataclass(eq=False)
class Answer:
    """A text as it comes: iterate over `pieces` once, then read the rest."""

    service: Service
    plan: TextPlan
    stream: Stream
    times: RequestTimes
    num_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    stopped_by: str | None = None
    """The stop text that ended it, if one did."""
    experts_TNK: np.ndarray | None = None
    """Where asked, with the last piece: see Emitted."""

    async def pieces(self) -> AsyncIterator[Piece]:
        """
        Raises:
          ApiError: the request failed on its way.
        """
        text = self.plan.reply_text(self.service.model)
        waiting: list[TokenLogprobs] = []
        finish = None
        try:
            async for emitted in self.stream:
                if emitted.prompt_logprobs is not None:
                    self.prompt_logprobs = emitted.prompt_logprobs
                if emitted.experts_TNK is not None:
                    self.experts_TNK = emitted.experts_TNK
                self.cached_tokens += emitted.cached_tokens
                self.num_tokens += len(emitted.tokens)
                self.times.tokens(len(emitted.tokens))
                waiting += emitted.logprobs
                shown = text.add(emitted.tokens)
                if text.is_stopped or emitted.reason in ("stop", "stopped"):
                    finish = "stop"
                elif emitted.is_done:
                    finish = "length"
                if finish is not None:
                    shown = _joined(shown, text.finish())
                    self.stopped_by = text.stopped_by
                logprobs = tuple(waiting[: shown.num_tokens])
                del waiting[: shown.num_tokens]
                yield Piece(shown.text, shown.reasoning, logprobs, finish)
                if finish is not None:
                    break
        finally:
            self.times.ended(finish or "abort", len(self.plan.prompt), self)


def _joined(a: Shown, b: Shown) -> Shown:
    tokens = a.num_tokens + b.num_tokens
    return Shown(a.text + b.text, a.reasoning + b.reasoning, tokens)


@dataclass(eq=False)
class Call:
    """One request over HTTP, its body read."""

    body: Any
    request_id: str
    path: dict[str, str] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    """What the log says of it; handlers add to it."""

    def count(self, usage: "Usage") -> None:
        self.log |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }


@dataclass
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def openai(self) -> dict[str, Any]:
        """With DeepSeek's names for hits and misses of the cache, too."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


def usage_of(answers: Sequence[Answer], reasoning_tokens: int = 0) -> Usage:
    """Of answers to one prompt or several: a prompt counts once, whatever the number of its
    answers."""
    plans = {id(answer.plan): answer for answer in reversed(answers)}
    return Usage(
        sum(len(answer.plan.prompt) for answer in plans.values()),
        sum(answer.num_tokens for answer in answers),
        sum(min(a.cached_tokens, len(a.plan.prompt)) for a in plans.values()),
        reasoning_tokens,
    )


def with_experts(choice: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """The choice, with the experts of its tokens where they were asked for: `routed_experts`, an
    .npy file of int32 [tokens, MoE layers, experts per token] in base64."""
    if answer.experts_TNK is None:
        return choice
    file = io.BytesIO()
    np.save(file, answer.experts_TNK)
    return choice | {"routed_experts": base64.b64encode(file.getvalue()).decode()}


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def event(data: Any, name: str | None = None) -> str:
    """A server-sent event."""
    text = data if isinstance(data, str) else dumps(data)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"


def dumps(value: Any) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def merged(sources: Sequence[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """What several iterators give, with the place of each, as it comes.

    Raises:
      Exception: of the first that fails; the others are left.
    """
    if len(sources) == 1:
        async for value in sources[0]:
            yield 0, value
        return
    given: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue()
    end = object()

    async def pump(place: int, source: AsyncIterator[Any]) -> None:
        try:
            async for value in source:
                given.put_nowait((place, value, None))
            given.put_nowait((place, end, None))
        except Exception as error:
            given.put_nowait((place, end, error))

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    left = len(tasks)
    try:
        while left:
            place, value, error = await given.get()
            if error is not None:
                raise error
            if value is end:
                left -= 1
            else:
                yield place, value
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
