"""The client for programs without an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from deepseek.answers import Collected, Generation, failure, generation
from deepseek.errors import ConnectionFailed, StreamBroken, TimedOut
from deepseek.requests import CHAT, COMPLETIONS, Messages, Settings, body_of


class V3_1Client:
    """A server and the model that it serves; may be used by several threads.

    Args:
      api_key: None where the server asks for none.
      endpoint: http://HOST:PORT, with or without /v1.
      model: its name; None is whatever is served.
      timeout: seconds for a connection, and between two pieces of an answer.
      max_retries: further tries of a request that the server had no room for.
      http_client: one of your own (proxies, certificates); it is not closed.
    """

    def __init__(
        self,
        api_key: str | None = None,
        endpoint: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        timeout: float | httpx.Timeout = 600.0,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.Client | None = None,
    ) -> None:
        self.settings = Settings(api_key, endpoint, model, timeout, max_retries, headers)
        self._is_ours = http_client is None
        self._http = http_client or httpx.Client(timeout=timeout)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        suffix: str | None = None,
        expert_preference: str | Sequence[str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Generation:
        """The text that follows the prompt.

        Args:
          suffix: what follows the text, for models that fill in the middle.
          expert_preference: domains of experts that it would rather use.
          extra: further fields of the request.
        Raises:
          DeepSeekError: see deepseek.errors.
        """
        given = _without_self(locals())
        return generation(self._post(COMPLETIONS, body_of(self.settings, given, stream=False)))

    def stream(self, prompt: str, **settings: Any) -> TextStream:
        """As `generate`, the text as it comes: an iterator of its pieces."""
        given = {"prompt": prompt} | settings
        return TextStream(self, COMPLETIONS, body_of(self.settings, given, stream=True))

    def chat(self, messages: Messages, **settings: Any) -> Generation:
        """The answer to a conversation, {"role": ..., "content": ...} each; settings as of
        `generate`, and `tools`, `tool_choice`, `response_format`."""
        given = {"messages": list(messages)} | settings
        return generation(self._post(CHAT, body_of(self.settings, given, stream=False)))

    def stream_chat(self, messages: Messages, **settings: Any) -> TextStream:
        """As `chat`, the text as it comes."""
        given = {"messages": list(messages)} | settings
        return TextStream(self, CHAT, body_of(self.settings, given, stream=True))

    def session(self, system: str | None = None, **settings: Any) -> ChatSession:
        """A conversation that remembers what was said; settings are of all its answers."""
        return ChatSession(self, system, settings)

    def models(self) -> list[str]:
        """Names of what is served."""
        return [model["id"] for model in self._send("GET", "models", None).json()["data"]]

    def close(self) -> None:
        if self._is_ours:
            self._http.close()

    def __enter__(self) -> V3_1Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._send("POST", path, body)

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, *, stream: bool = False
    ) -> httpx.Response:
        """The answer, after as many tries as it takes; of a stream its head."""
        settings, attempt = self.settings, 0
        request = self._http.build_request(
            method, f"{settings.base_url}/{path}", json=body, headers=settings.all_headers()
        )
        while True:
            attempt += 1
            answer = error = None
            try:
                answer = self._http.send(request, stream=stream)
            except httpx.HTTPError as raised:
                error = raised
            if answer is not None and answer.status_code < 400:
                return answer
            if answer is not None and stream:
                answer.read()
            wait = settings.wait(attempt, answer)
            if wait is None:
                raise failure(answer) if answer is not None else connection_error(error)
            time.sleep(wait)


class TextStream:
    """Pieces of a text as they come; afterwards `generation` has all of it."""

    def __init__(self, client: V3_1Client, path: str, body: dict[str, Any]) -> None:
        self._answer = client._send("POST", path, body, stream=True)
        self._got = Collected(request_id=self._answer.headers.get("x-request-id"))

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
          DeepSeekError: the server failed, or hung up.
        """
        try:
            for line in self._answer.iter_lines():
                if text := self._got.take(line):
                    yield text
        except httpx.HTTPError as error:
            raise StreamBroken(str(error) or type(error).__name__, self._got.text) from error
        finally:
            self.close()
        if not self._got.is_done:
            raise StreamBroken("the stream ended before its end", self._got.text)

    @property
    def generation(self) -> Generation:
        return self._got.generation()

    @property
    def generated_text(self) -> str:
        return self._got.text

    def close(self) -> None:
        """Ends the request: the server makes no further token."""
        self._answer.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ChatSession:
    """A conversation; `messages` is all that was said in it."""

    def __init__(self, client: V3_1Client, system: str | None, settings: dict[str, Any]) -> None:
        self._client, self._settings = client, settings
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def send(self, text: str, **settings: Any) -> Generation:
        """The answer; a message that was not answered is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._client.chat(asked, **(self._settings | settings))
        self.messages = [*asked, {"role": "assistant", "content": answer.generated_text}]
        return answer

    def stream(self, text: str, **settings: Any) -> Iterator[str]:
        """The answer as it comes; remembered once it is whole."""
        asked = [*self.messages, {"role": "user", "content": text}]
        with self._client.stream_chat(asked, **(self._settings | settings)) as stream:
            yield from stream
            answer = stream.generated_text
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def connection_error(error: BaseException | None) -> ConnectionFailed:
    """Of what the HTTP library raised."""
    kind = TimedOut if isinstance(error, httpx.TimeoutException) else ConnectionFailed
    made = kind(str(error) or type(error).__name__)
    made.__cause__ = error
    return made


def _without_self(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "self"}
