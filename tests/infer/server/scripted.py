"""An engine that says what it is told to, and a server around it on a real socket."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from configs.checks import UserError
from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.engine import Emitted, EngineStats, Request, TokenLogprobs
from infer.engine.types import ConstraintFailed
from infer.server.app import make_app
from infer.server.engine_thread import EngineThread
from infer.server.keys import ApiKeys
from infer.server.metrics import Metrics
from infer.server.process import ListenOptions, address_of, bind, serve
from infer.server.served_model import ServedModel
from infer.server.service import Limits, Service

SPECIALS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str = TEMPLATE, words: Sequence[str] = ()) -> PublicTokenizer:
    """A token for each byte, some special ones, and these words whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    tokenizer.add_tokens([AddedToken(word, special=False) for word in words])
    tokenizer.encode_special_tokens = True
    end, im_end = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|im_end|>")
    return PublicTokenizer(tokenizer, end, frozenset({end, im_end}), False, template, end)


@dataclass
class ScriptedEngine:
    """Answers each request with the tokens that `reply` has for it, one a step, then ends it."""

    tokenizer: PublicTokenizer
    reply: Callable[[Request], Sequence[int]]
    max_rows: int = 4
    step_seconds: float = 0.0
    live: dict[int, Request] = field(default_factory=dict)
    said: dict[int, list[int]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    _next: int = 0

    def add(self, request: Request) -> int:
        number, self._next = self._next, self._next + 1
        self.live[number], self.said[number] = request, []
        self.seen.append(request)
        return number

    def has_work(self) -> bool:
        return bool(self.live)

    def cancel(self, number: int) -> None:
        if self.live.pop(number, None) is not None:
            self.cancelled.append(number)

    def warm_up(self, on_progress=lambda done, total: None) -> None:
        on_progress(1, 1)

    def stats(self) -> EngineStats:
        running = min(len(self.live), self.max_rows)
        waiting, read = len(self.live) - running, sum(map(len, self.said.values()))
        load = (np.array([read, 3, 0]), np.array([1, 1, read]))
        return EngineStats(running, waiting, 8 - running, 8, 10, 4, 0, 7, 5, load)

    def step(self) -> list[Emitted]:
        time.sleep(self.step_seconds)
        return [self._next_of(n) for n in list(self.live)[: self.max_rows]]

    def _next_of(self, number: int) -> Emitted:
        request, said = self.live[number], self.said[number]
        script = list(self.reply(request))
        token = script[len(said)] if len(said) < len(script) else min(request.stop_ids, default=0)
        first = {}
        if not said:
            first = {"cached_tokens": len(request.prompt) // 2}
            if request.prompt_logprobs:
                entries = [logprob_of(t, request.num_logprobs) for t in request.prompt[1:]]
                first["prompt_logprobs"] = (None, *entries)
        try:
            token = self._constrained(request, token)
        except ConstraintFailed as error:
            del self.live[number]
            return Emitted(number, [], True, "error", error=str(error), **first)
        if token == -1:
            del self.live[number]
            return Emitted(number, [], True, "error", error="the logits are no numbers", **first)
        if token in request.stop_ids:
            del self.live[number]
            return Emitted(number, [], True, "stop", **first)
        said.append(token)
        reason = None
        if request.is_stopped is not None and request.is_stopped(said):
            reason = "stopped"
        elif len(said) == request.max_new_tokens:
            reason = "length"
        if reason is not None:
            del self.live[number]
        logprobs = ()
        if request.num_logprobs is not None:
            logprobs = (logprob_of(token, request.num_logprobs),)
        return Emitted(number, [token], reason is not None, reason, logprobs, **first)

    def _constrained(self, request: Request, token: int) -> int:
        if request.constraint is None:
            return token
        allowed_V = request.constraint.allowed_V()
        assert allowed_V is not None
        if not allowed_V[token]:
            token = int(np.flatnonzero(allowed_V)[0])
        if token not in request.stop_ids:
            request.constraint.accept(token)
        return token


def logprob_of(token: int, count: int | None) -> TokenLogprobs:
    """Made up, but told again for the same token."""
    best = tuple((i, -0.5 - i / 8) for i in range(count or 0))
    return TokenLogprobs(token, -0.25 - token / 512, best)


class Served:
    """A server on a thread of its own."""

    def __init__(self, service: Service, keys: ApiKeys, prepare: Callable[[], None]) -> None:
        self.service = service
        options = ListenOptions(port=0, drain_seconds=2.0)
        listening = bind(options)
        self.url = address_of(listening, options.host)
        self._began, self._loop = threading.Event(), asyncio.new_event_loop()
        self.stopping: asyncio.Event | None = None

        async def run() -> None:
            self.stopping = asyncio.Event()
            ready = self._began.set
            app = make_app(service, keys)
            await serve(service, app, listening, options, prepare, ready, self.stopping)

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(run()))
        self._thread.start()
        assert self._began.wait(30)

    def stop(self) -> None:
        if self.stopping is not None:
            self._loop.call_soon_threadsafe(self.stopping.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def served(
    engine,
    tokenizer: PublicTokenizer,
    *,
    keys: Sequence[str] = (),
    limits: Limits = Limits(ping_seconds=0.2),
    most_waiting: int = 64,
    max_length: int = 1024,
    vocab_size: int | None = None,
    prepare: Callable[[], None] = lambda: None,
    max_rows: int | None = None,
    **service_of,
) -> Iterator[Served]:
    def find_preference(names):
        known = {"code_generation": 0, "algorithm_design": 1}
        for name in names:
            if name.partition(":")[0] not in known:
                raise UserError(f"unknown domain {name!r}: there are {', '.join(known)}")
        return {"layer_0": np.array([known[n.partition(":")[0]] for n in names])}

    model = ServedModel(
        "tiny", tokenizer, vocab_size or tokenizer.vocab_size, max_length, find_preference
    )
    metrics = Metrics("tiny")
    thread = EngineThread(engine, max_rows or engine.max_rows, most_waiting, metrics.step)
    service = Service(model, thread, metrics, limits, **service_of)
    made = Served(service, ApiKeys(list(keys)), prepare)
    try:
        yield made
    finally:
        made.stop()
