"""Between ASGI and the handlers: bodies in, answers and event streams out.

Disconnects cancel a handler whether it streams or not. A stream's first event is made before its
head is sent, so that what can't be served is an HTTP error and not a broken stream.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import BaseModel

from configs.checks import UserError
from infer.server.bodies import Receive, parse, read_body
from infer.server.errors import ApiError, internal, invalid, shape
from infer.server.keys import ApiKeys
from infer.server.service import Call, Service, dumps, event, new_id

LOG = logging.getLogger("moesaic.server")
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[Service, Call], Awaitable[Any]]
REQUEST_ID = re.compile(r"[\w\-.]{1,128}")


class Raw:
    """An answer that is not JSON."""

    def __init__(self, body: bytes, kind: str) -> None:
        self.body, self.kind = body, kind


class Endpoint:
    """An ASGI application of one handler."""

    def __init__(
        self, service: Service, handler: Handler, model: type[BaseModel] | None, dialect: str
    ) -> None:
        self._service, self._handler = service, handler
        self._model, self._dialect = model, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        call = Call(None, state["request_id"], dict(scope.get("path_params", {})), state["log"])
        self._service.num_calls += 1
        try:
            await self._answer(scope, receive, send, call)
        except (ApiError, UserError) as raised:
            error = raised if isinstance(raised, ApiError) else invalid(str(raised))
            _note(call, error, self._service)
            await send_json(send, error.status, shape(error, self._dialect), error.headers)
        except Exception:
            LOG.exception("request %s failed", call.request_id)
            error = internal(call.request_id)
            await send_json(send, 500, shape(error, self._dialect), error.headers)
        finally:
            self._service.num_calls -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        if self._model is not None:
            headers = dict(scope["headers"])
            _check_kind(headers.get(b"content-type", b""))
            limits, length = self._service.limits, headers.get(b"content-length", b"")
            raw = await read_body(
                receive,
                most_bytes=limits.max_body_bytes,
                seconds=limits.body_seconds,
                told=int(length) if length.isdigit() else None,
            )
            call.body = parse(self._model, raw)
        given = await self._handler(self._service, call)
        if isinstance(given, Raw):
            await _send(send, 200, given.body, given.kind)
        elif isinstance(given, AsyncIterator):
            await self._stream(send, given, call)
        else:
            await send_json(send, 200, given)

    async def _stream(self, send: Send, events: AsyncIterator[str], call: Call) -> None:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            first = await anext(events)
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))  # of nginx
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await _chunk(send, first)
                async for text in with_pings(events, self._service.limits.ping_seconds):
                    await _chunk(send, text)
            except ApiError as error:
                _note(call, error, self._service)
                await _chunk(send, self._error_event(error))
            except Exception:
                LOG.exception("request %s failed", call.request_id)
                await _chunk(send, self._error_event(internal(call.request_id)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _error_event(self, error: ApiError) -> str:
        name = "error" if self._dialect in ("anthropic", "responses") else None
        if self._dialect == "responses":
            fields = {"code": error.code, "message": error.message, "param": error.param}
            return event({"type": "error", "sequence_number": 0} | fields, name)
        return event(shape(error, self._dialect), name)


def _check_kind(kind: bytes) -> None:
    """A page of another site can send forms, but no JSON, without being asked first."""
    if kind and b"json" not in kind.lower():
        raise ApiError(
            415,
            f"content-type is {kind[:100].decode('latin-1')!r}: send application/json",
            code="unsupported_media_type",
        )


def _note(call: Call, error: ApiError, service: Service) -> None:
    call.log["error"] = error.message
    if error.code == "queue_full":
        service.metrics.rejected.inc()
    if error.status == 500:
        service.metrics.corrupted.inc()


async def with_pings(events: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """The events, and a comment whenever there was none for so long."""
    while True:
        following = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({following}, timeout=seconds))[0]:
                yield ": still working\n\n"
            yield following.result()
        except StopAsyncIteration:
            return
        finally:
            if not following.done():
                following.cancel()
                with contextlib.suppress(BaseException):
                    await following


async def send_json(
    send: Send, status: int, value: Any, headers: dict[str, str] | None = None
) -> None:
    extra = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    await _send(send, status, dumps(value).encode(errors="replace"), "application/json", extra)


async def _send(
    send: Send, status: int, body: bytes, kind: str, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    headers += extra or []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _chunk(send: Send, text: str) -> None:
    body = text.encode(errors="replace")
    await send({"type": "http.response.body", "body": body, "more_body": True})


class CancelOnDisconnect:
    """Ends a handler whose client is gone, also one that sends nothing before its end."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(1)
        work = asyncio.ensure_future(self._app(scope, messages.get, send))

        async def listen() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                await messages.put(message)

        gone = asyncio.ensure_future(listen())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["state"]["log"]["error"] = "the client is gone"
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class Admission:
    """Request ids, keys and the log of every request.

    Args:
      public: paths that need no key.
      probes: paths that are asked every few seconds: not in the log.
    """

    def __init__(
        self, app: App, keys: ApiKeys, public: frozenset[str], probes: frozenset[str]
    ) -> None:
        self._app, self._keys, self._public, self._probes = app, keys, public, probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else new_id("req_")
        log: dict[str, Any] = {}
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": request_id, "log": log}
        began, status = time.monotonic(), 0

        async def named(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(b"x-request-id", request_id.encode()), (b"request-id", request_id.encode())]
                message["headers"] = [*message.get("headers", ()), *ids]
            await send(message)

        try:
            if scope["path"] not in self._public and not self._keys.allow(headers):
                error = ApiError(401, "the API key is missing or not known here: send it as "
                                 '"Authorization: Bearer KEY"', code="invalid_api_key")  # fmt: skip
                dialect = "anthropic" if scope["path"].startswith("/v1/messages") else "openai"
                await send_json(named, 401, shape(error, dialect), {"www-authenticate": "Bearer"})
                return
            await self._app(scope, receive, named)
        finally:
            entry = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
            }
            is_probe = scope["path"] in self._probes
            LOG.log(logging.DEBUG if is_probe else logging.INFO, json.dumps(entry | log))
