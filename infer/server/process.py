"""The server as a process: its socket, its signals, and how it stops.

SIGTERM or Ctrl-C: /ready says no, new requests are refused with 503, those under way are answered
to their end (within a bound), and the process exits with 0. A second signal stops at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from configs.checks import UserError
from infer.server.http_layer import App
from infer.server.service import Service

LOG = logging.getLogger("moesaic.server")
MOST_HEADER_BYTES = 64 * 1024


@dataclass(frozen=True)
class ListenOptions:
    """Where to listen, and how to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    drain_seconds: float = 30.0
    """For requests under way once the server is asked to stop."""


def bind(options: ListenOptions) -> socket.socket:
    """A socket that listens; connections wait until they are served.

    Raises:
      UserError: an address that is taken, or that there is not.
    """
    where = f"{options.host}:{options.port}"
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {options.host} is no address of this machine: {error}") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise UserError(
            f"can't listen at {where} ({error.strerror}): choose another --port"
        ) from error
    listening.listen(2048)
    listening.setblocking(False)
    return listening


def address_of(listening: socket.socket, host: str) -> str:
    """http://HOST:PORT as a client reaches it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    shown = f"[{shown}]" if ":" in shown and not shown.startswith("[") else shown
    return f"http://{shown}:{listening.getsockname()[1]}"


async def serve(
    service: Service,
    app: App,
    listening: socket.socket,
    options: ListenOptions,
    prepare: Callable[[], None],
    on_ready: Callable[[], None],
    stopping: asyncio.Event | None = None,
) -> None:
    """Answers until a signal comes and what was under way is done.

    Args:
      prepare: makes the engine ready, on its thread; health is answered meanwhile.
      on_ready: called once requests are welcome.
      stopping: set to stop, as a signal does.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(service.limits.header_seconds),
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        ws="none",
    )
    server = _Server(config)
    stopping = stopping or asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            server.should_exit = server.force_exit = True
        service.is_draining = True
        stopping.set()

    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop)
    for engine in service.engines:
        engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    getting_ready = asyncio.create_task(_get_ready(service, prepare, on_ready))
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, waiting, getting_ready}, return_when=asyncio.FIRST_COMPLETED)
    if service.is_ready:
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    await _drain(service, options.drain_seconds, serving)
    server.should_exit = True
    getting_ready.cancel()
    waiting.cancel()
    await serving
    if getting_ready.done() and not getting_ready.cancelled():
        getting_ready.result()
    for engine in service.engines:
        await engine.stop()


async def _get_ready(
    service: Service, prepare: Callable[[], None], on_ready: Callable[[], None]
) -> None:
    await service.engine.call(lambda engine: prepare())
    service.engine.on_step(await service.engine.call(lambda engine: engine.stats()))
    service.is_ready = True
    on_ready()


async def _drain(service: Service, seconds: float, serving: "asyncio.Task[None]") -> None:
    """Waits for the requests under way; those that are left are cancelled."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    service.engine.resume()  # what a pause holds back is answered, too
    while service.num_calls and loop.time() < end and not serving.done():
        await asyncio.sleep(0.05)
    if service.num_calls:
        LOG.warning("%d requests are left after %g s: cancelled", service.num_calls, seconds)
        for engine in service.engines:
            engine.cancel_all("the server is stopping: send the request to another one")


class _Server(uvicorn.Server):
    """Uvicorn's, with our signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _protocol(header_seconds: float) -> type[H11Protocol]:
    """Uvicorn's HTTP/1.1, which gives a connection so long to send the head of its first request,
    and answers what is no HTTP in the shape of the interface."""

    class Protocol(H11Protocol):
        def connection_made(self, transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(header_seconds, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            body = (
                b'{"error":{"message":"this is no HTTP request: check the address and the headers",'
                b'"type":"invalid_request_error","param":null,"code":"bad_http"}}'
            )
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            with contextlib.suppress(h11.LocalProtocolError):
                head = self.conn.send(
                    h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
                )
                rest = self.conn.send(h11.Data(data=body)), self.conn.send(h11.EndOfMessage())
                self.transport.write(b"".join(part or b"" for part in (head, *rest)))
            self.transport.close()

    return Protocol


def log_to(stream=None) -> None:
    """JSON lines of the server's log, one for each request; no prompts, no answers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
