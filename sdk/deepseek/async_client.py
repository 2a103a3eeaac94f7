"""The client for programs with an event loop: the same methods, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any

import httpx

from deepseek.answers import Collected, Generation, failure, generation
from deepseek.client import connection_error
from deepseek.errors import StreamBroken
from deepseek.requests import CHAT, COMPLETIONS, Messages, Settings, body_of


class AsyncV3_1Client:
    """As V3_1Client (see there), for asyncio."""

    def __init__(
        self,
        api_key: str | None = None,
        endpoint: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        timeout: float | httpx.Timeout = 600.0,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        self.settings = Settings(api_key, endpoint, model, timeout, max_retries, headers)
        self._is_ours = http_client is None
        self._http = http_client or httpx.AsyncClient(timeout=timeout)

    async def generate(self, prompt: str, **settings: Any) -> Generation:
        """The text that follows the prompt; settings as of V3_1Client.generate."""
        given = {"prompt": prompt} | settings
        body = body_of(self.settings, given, stream=False)
        return generation(await self._send("POST", COMPLETIONS, body))

    def stream(self, prompt: str, **settings: Any) -> AsyncTextStream:
        """As `generate`, the text as it comes: an asynchronous iterator of its pieces."""
        given = {"prompt": prompt} | settings
        return AsyncTextStream(self, COMPLETIONS, body_of(self.settings, given, stream=True))

    async def chat(self, messages: Messages, **settings: Any) -> Generation:
        """The answer to a conversation."""
        given = {"messages": list(messages)} | settings
        body = body_of(self.settings, given, stream=False)
        return generation(await self._send("POST", CHAT, body))

    def stream_chat(self, messages: Messages, **settings: Any) -> AsyncTextStream:
        """As `chat`, the text as it comes."""
        given = {"messages": list(messages)} | settings
        return AsyncTextStream(self, CHAT, body_of(self.settings, given, stream=True))

    def session(self, system: str | None = None, **settings: Any) -> AsyncChatSession:
        """A conversation that remembers what was said."""
        return AsyncChatSession(self, system, settings)

    async def models(self) -> list[str]:
        """Names of what is served."""
        answer = await self._send("GET", "models", None)
        return [model["id"] for model in answer.json()["data"]]

    async def close(self) -> None:
        if self._is_ours:
            await self._http.aclose()

    async def __aenter__(self) -> AsyncV3_1Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _send(
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
                answer = await self._http.send(request, stream=stream)
            except httpx.HTTPError as raised:
                error = raised
            if answer is not None and answer.status_code < 400:
                return answer
            if answer is not None and stream:
                await answer.aread()
            wait = settings.wait(attempt, answer)
            if wait is None:
                raise failure(answer) if answer is not None else connection_error(error)
            await asyncio.sleep(wait)


class AsyncTextStream:
    """Pieces of a text as they come; the request is sent with the first one asked for."""

    def __init__(self, client: AsyncV3_1Client, path: str, body: dict[str, Any]) -> None:
        self._client, self._path, self._body = client, path, body
        self._answer: httpx.Response | None = None
        self._got = Collected()

    async def __aiter__(self) -> AsyncIterator[str]:
        """
        Raises:
          DeepSeekError: the request was refused, the server failed, or hung up.
        """
        answer = await self._client._send("POST", self._path, self._body, stream=True)
        self._answer = answer
        self._got = Collected(request_id=answer.headers.get("x-request-id"))
        try:
            async for line in answer.aiter_lines():
                if text := self._got.take(line):
                    yield text
        except httpx.HTTPError as error:
            raise StreamBroken(str(error) or type(error).__name__, self._got.text) from error
        finally:
            await answer.aclose()
        if not self._got.is_done:
            raise StreamBroken("the stream ended before its end", self._got.text)

    @property
    def generation(self) -> Generation:
        return self._got.generation()

    @property
    def generated_text(self) -> str:
        return self._got.text

    async def close(self) -> None:
        """Ends the request: the server makes no further token."""
        if self._answer is not None:
            await self._answer.aclose()


class AsyncChatSession:
    """A conversation; `messages` is all that was said in it."""

    def __init__(
        self, client: AsyncV3_1Client, system: str | None, settings: dict[str, Any]
    ) -> None:
        self._client, self._settings = client, settings
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    async def send(self, text: str, **settings: Any) -> Generation:
        """The answer; a message that was not answered is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = await self._client.chat(asked, **(self._settings | settings))
        self.messages = [*asked, {"role": "assistant", "content": answer.generated_text}]
        return answer

    async def stream(self, text: str, **settings: Any) -> AsyncIterator[str]:
        """The answer as it comes; remembered once it is whole."""
        asked = [*self.messages, {"role": "user", "content": text}]
        stream = self._client.stream_chat(asked, **(self._settings | settings))
        async for piece in stream:
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": stream.generated_text}]
