"""A model under evaluation behind an HTTP server: OpenAI's interface, this project's or another's.

Log-likelihoods come by echo of token ids, as lm-evaluation-harness asks for them, so the server
must have /tokenize and /tokenizer_info beside /v1 (this project's and vLLM's do).
"""

import concurrent.futures
import itertools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

from configs.checks import UserError, require
from data.tokenizers.public_tokenizer import PublicTokenizer
from evals.likelihood import Pair, encode_pair, first_id
from evals.results_form import ModelDescription
from evals.samples import Answer, Likelihood, Prompt, Rolling

KEY = "OPENAI_API_KEY"
"""The environment's variable that has the key, where the server wants one."""
CLIENTS = 16
"""Requests at once; the server batches them."""
SECONDS = 600.0
"""For one answer."""
WINDOW = 1024
"""Tokens of the windows in which long texts are read, at most."""
PATIENCE = 300.0
"""Seconds for which a request is asked again of a server that is full, or still reads its model."""

Asked = TypeVar("Asked")
Given = TypeVar("Given")


def _silent(index: int, answer: Any) -> None: ...


def is_url(name: str) -> bool:
    """Whether a model's name is the address of a server."""
    return name.startswith(("http://", "https://"))


@dataclass(frozen=True)
class _Ends:
    """What of a tokenizer is known from afar; `encode` asks the server."""

    model: "HttpModel"
    bos_id: int | None
    eos_id: int | None

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset() if self.eos_id is None else frozenset({self.eos_id})

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        body: dict[str, Any] = {"prompt": text}
        if bos is not None:
            body["add_special_tokens"] = bos
        return self.model.ask("/tokenize", body)["tokens"]


@dataclass(frozen=True)
class HttpModel:
    """The three verbs (evals/samples.py) of the model that a server names first.

    Args:
      url: with or without /v1.
    """

    url: str
    api_key: str | None = None

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @cached_property
    def served(self) -> Mapping[str, Any]:
        """The server's entry of its model.

        Raises:
          UserError: it does not answer, or serves nothing.
        """
        models = self.ask("/v1/models", None).get("data") or []
        require(bool(models), f"{self.url} serves no model")
        return models[0]

    @property
    def context_length(self) -> int:
        """
        Raises:
          UserError: the server does not say.
        """
        length = self.served.get("max_model_len")
        require(isinstance(length, int), f"{self.url}/models tells no max_model_len")
        return cast(int, length)

    @property
    def _length(self) -> int:
        """Tokens that are read at most: the last one of a text is only scored, and the server makes
        one more."""
        return self.context_length - 2

    @cached_property
    def tokenizer(self) -> PublicTokenizer:
        """
        Raises:
          UserError: the server tells nothing of its tokenizer.
        """
        info = self.ask("/tokenizer_info", None)
        ids = [info.get("bos_token_id"), info.get("eos_token_id")]
        for i, name in enumerate(("bos_token", "eos_token")):
            if ids[i] is None and info.get(name):  # vLLM tells the text alone
                body = {"prompt": info[name], "add_special_tokens": False}
                ids[i] = self.ask("/tokenize", body)["tokens"][0]
        return cast(PublicTokenizer, _Ends(self, *ids))

    def describe(self) -> ModelDescription:
        """What results say of it, and are tied to."""
        name = f"{self.url} {self.served['id']}"
        return ModelDescription(name, "server", None, max_length=self.context_length)

    def log_likelihoods(
        self,
        pairs: Sequence[tuple[str, str]],
        on_answer: Callable[[int, Likelihood], None] = _silent,
    ) -> list[Likelihood]:
        """Of each (context, continuation); see evals/likelihood.py."""

        def score(pair: tuple[str, str]) -> Likelihood:
            encoded = encode_pair(self.tokenizer, *pair, self._length)
            if not encoded.targets:
                return Likelihood(0.0, True, 0)
            nats, is_greedy = self._score(encoded)
            return Likelihood(nats, is_greedy, len(encoded.targets), encoded.num_dropped)

        return self._all(pairs, score, on_answer)

    def _score(self, pair: Pair) -> tuple[float, bool]:
        """The sum of the targets' log-probabilities, and whether each is the best."""
        ids = [*pair.tokens, pair.targets[-1]]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        found = self._post("/v1/completions", body)["choices"][0].get("logprobs") or {}
        nats, tops = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        require(
            len(nats) in (len(ids), len(ids) + 1) and len(tops) == len(nats),
            f"{self.url} gave {len(nats)} log-probabilities for {len(ids)} echoed tokens: it can't "
            "be scored, as it does not echo prompts with log-probabilities",
        )
        places = range(pair.begin, len(ids))
        is_greedy = all(nats[i] == max(tops[i].values()) for i in places)
        return float(sum(nats[i] for i in places)), is_greedy

    def rolling(
        self, texts: Sequence[str], on_answer: Callable[[int, Rolling], None] = _silent
    ) -> list[Rolling]:
        """Each text after the token that begins one, in windows that move by half a window, as
        infer/score.py has them."""

        def score(text: str) -> Rolling:
            ids = [first_id(self.tokenizer), *self.tokenizer.encode(text, bos=False)]
            length = min(self._length, WINDOW)
            nats, done, start = 0.0, 1, 0
            while done < len(ids):
                window = ids[start : start + length + 1]
                count = start + len(window) - done
                pair = Pair(tuple(window[:-1]), tuple(window[len(window) - count :]))
                nats += self._score(pair)[0]
                done, start = start + len(window), start + max(length // 2, 1)
            return Rolling(nats, len(ids) - 1, len(text.encode()))

        return self._all(texts, score, on_answer)

    def generate(
        self, prompts: Sequence[Prompt], on_answer: Callable[[int, list[Answer]], None] = _silent
    ) -> list[list[Answer]]:
        """num_answers of each prompt, with seeds 0, 1, 2, ..."""
        return self._all(prompts, self._answers, on_answer)

    def _answers(self, prompt: Prompt) -> list[Answer]:
        body: dict[str, Any] = {
            "temperature": prompt.temperature,
            "max_tokens": prompt.max_new_tokens,
            "n": prompt.num_answers,
            "seed": 0,
        }
        if prompt.temperature > 0:
            body["top_p"] = prompt.top_p
        if prompt.stops:
            body["stop"] = list(prompt.stops)
        num_dropped = 0
        if isinstance(prompt.prompt, str):
            ids = self.tokenizer.encode(prompt.prompt) or [first_id(self.tokenizer)]
            longest = self.context_length
            num_dropped = max(
                len(ids) - max(longest - prompt.max_new_tokens, (longest + 1) // 2), 0
            )
            found = self._post("/v1/completions", body | {"prompt": ids[num_dropped:]})
        else:
            body["messages"] = [dict(message) for message in prompt.prompt]
            if prompt.tools:
                body["tools"] = [_declared(tool) for tool in prompt.tools]
            found = self._post("/v1/chat/completions", body)
        tokens = found.get("usage", {}).get("completion_tokens", 0) // prompt.num_answers
        return [_answer(choice, tokens, num_dropped) for choice in found["choices"]]

    # --- HTTP ------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self.ask(path, body | {"model": self.served["id"]})

    def ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer to a request; a full queue, or a model that is not ready, is asked again.

        Raises:
          UserError: the server is not there, or refuses.
        """
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, headers)
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503) or time.monotonic() - began > PATIENCE:
                    raise UserError(_refusal(self.url, path, error)) from error
                _wait(error.headers.get("retry-after"), attempt)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.url} does not answer {path}: {error}") from error
        raise AssertionError("a count does not end")

    def _all(
        self,
        asked: Sequence[Asked],
        answer: Callable[[Asked], Given],
        on_answer: Callable[[int, Given], None],
    ) -> list[Given]:
        """The answers in order, several asked for at once; told as they come."""
        found: dict[int, Given] = {}
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            places = {pool.submit(answer, each): i for i, each in enumerate(asked)}
            try:
                for future in concurrent.futures.as_completed(places):
                    i = places[future]
                    found[i] = future.result()
                    on_answer(i, found[i])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[i] for i in range(len(asked))]


def http_model(url: str) -> HttpModel:
    """The model of this server, with the key that the environment has."""
    return HttpModel(url, os.environ.get(KEY))


def _declared(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def _answer(choice: Mapping[str, Any], num_tokens: int, num_dropped: int) -> Answer:
    message = choice.get("message") or {}
    text = choice.get("text") or message.get("content") or ""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    text += "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    if choice.get("finish_reason") == "length":
        return Answer(text, "length", num_tokens, num_dropped)
    ended = "stop" if isinstance(choice.get("stop_reason"), str) else "end"
    return Answer(text, ended, num_tokens, num_dropped)


def _refusal(url: str, path: str, error: urllib.error.HTTPError) -> str:
    try:
        message = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        message = str(error.reason)
    hint = f"; put the key into {KEY}" if error.code == 401 else ""
    return f"{url} refuses {path} with {error.code}: {message}{hint}"


def _wait(asked: str | None, attempt: int) -> None:

    seconds = float(asked) if asked and asked.replace(".", "").isdigit() else 2.0**attempt
    time.sleep(min(seconds, 30.0))
