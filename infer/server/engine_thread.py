"""The engine's thread: requests go in, what the engine gives them comes out on the event loop.

The engine belongs to one thread. Everything else posts commands to it; they are taken between two
steps, so that a client that is gone frees its row and pages within one step.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.checks import UserError
from infer.engine import Emitted, Engine, EngineStats, Request
from infer.server.errors import ApiError, invalid

LOG = logging.getLogger("moesaic.server")
STOP_SECONDS = 5.0
"""For the step, or the compilation, that runs when the thread is asked to end."""


class Stream:
    """What the engine gives one request, step by step."""

    def __init__(self, number: int, cancel: "Callable[[Stream], None]") -> None:
        self.number = number
        self.is_done = False
        self._cancel = cancel
        self._waiting: asyncio.Queue[Emitted | ApiError] = asyncio.Queue()

    def put(self, emitted: Emitted | ApiError) -> None:
        self._waiting.put_nowait(emitted)

    async def __aiter__(self) -> AsyncIterator[Emitted]:
        """
        Raises:
          ApiError: the engine or the request failed.
        """
        while not self.is_done:
            emitted = await self._waiting.get()
            if isinstance(emitted, ApiError):
                self.is_done = True
                raise emitted
            self.is_done = emitted.is_done
            if emitted.reason == "error":
                raise ApiError(500, emitted.error or "the request failed", code="generation_failed")
            if emitted.reason == "cancelled":
                raise ApiError(503, "the request was cancelled: send it again", retry_after=1)
            yield emitted

    def close(self) -> None:
        """Frees what the request holds, if it has not ended."""
        if not self.is_done:
            self.is_done = True
            self._cancel(self)


@dataclass
class _Add:
    requests: Sequence[Request]
    future: "asyncio.Future[list[Stream]]"


@dataclass
class _Call:
    """Something to be done with the engine between two steps."""

    run: Callable[[Engine], Any]
    future: "asyncio.Future[Any] | None"


@dataclass
class _Swap:
    """Another engine, once nobody uses this one."""

    make: Callable[[Engine], Engine]
    future: "asyncio.Future[None]"


@dataclass
class _Cancel:
    number: int


@dataclass
class EngineThread:
    """Runs an engine; its public methods are called on the event loop.

    Args:
      most_waiting: requests beyond the engine's rows that may wait; one more is refused.
    """

    engine: Engine
    max_rows: int
    most_waiting: int
    on_step: Callable[[EngineStats], None] = lambda stats: None
    is_paused: bool = False
    failure: str | None = None
    _commands: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    _streams: dict[int, Stream] = field(default_factory=dict)
    _num_posted: int = 0
    """Requests under way to the engine."""
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; requests that are left get an error."""
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        self._fail_streams(ApiError(503, "the server is stopping: send it again", retry_after=2))

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended: a compilation can't be interrupted."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._streams) + self._num_posted

    async def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """A stream for each request, or none of them.

        Raises:
          ApiError: one that can't be served, a full queue, or an engine that failed.
        """
        if self.failure is not None:
            raise ApiError(500, f"the engine failed: {self.failure}", code="engine_failed")
        waiting, room = self.num_live - self.max_rows, self.most_waiting
        if len(requests) > self.max_rows + room:
            raise invalid(
                f"{len(requests)} texts at once exceed the {self.max_rows} rows and {room} places "
                "in the queue: send fewer in one request"
            )
        if waiting + len(requests) > room:
            seconds = 1 + max(waiting, 0) // (4 * self.max_rows)
            raise ApiError(
                429,
                f"{max(waiting, 0)} requests wait, at most {room} may: try again later",
                code="queue_full",
                retry_after=min(seconds, 30),
            )
        return await self._add(requests)

    async def _add(self, requests: Sequence[Request]) -> list[Stream]:
        future: asyncio.Future[list[Stream]] = asyncio.get_running_loop().create_future()
        self._num_posted += len(requests)
        self._commands.put(_Add(requests, future))
        try:
            return await asyncio.shield(future)
        except UserError as error:
            raise invalid(str(error)) from error
        except asyncio.CancelledError:
            future.add_done_callback(self._drop)
            raise

    def _drop(self, future: "asyncio.Future[list[Stream]]") -> None:
        """Closes the streams of who did not wait for them."""
        if not future.cancelled() and future.exception() is None:
            for stream in future.result():
                stream.close()

    async def call(self, run: Callable[[Engine], Any]) -> Any:
        """What the function returns, run between two steps."""
        future = asyncio.get_running_loop().create_future()
        self._commands.put(_Call(run, future))
        return await future

    async def swap(self, make: Callable[[Engine], Engine]) -> None:
        """Another engine, once the requests under way have ended; later ones wait for it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._commands.put(_Swap(make, future))
        await future

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._commands.put(_Call(lambda engine: None, None))  # wakes the thread

    def cancel_all(self, sentence: str) -> None:
        """Ends every request with this error."""
        for stream in list(self._streams.values()):
            self._commands.put(_Cancel(stream.number))
        self._fail_streams(ApiError(503, sentence, retry_after=2))

    def _cancel(self, stream: Stream) -> None:
        """Numbers begin again with another engine: only a stream that is under way is meant."""
        if self._streams.get(stream.number) is stream:
            del self._streams[stream.number]
            self._commands.put(_Cancel(stream.number))

    # --- On the loop, called by the thread -------------------------------------------------------

    def _post(self, call: Callable[..., None], *values: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)

    def _added(self, command: _Add, numbers: list[int], error: BaseException | None) -> None:
        self._num_posted -= len(command.requests)
        streams = [Stream(number, self._cancel) for number in numbers]
        self._streams |= {stream.number: stream for stream in streams}
        if error is not None:
            command.future.set_exception(error)
        else:
            command.future.set_result(streams)

    def _deliver(self, emitted: list[Emitted], stats: EngineStats) -> None:
        self.on_step(stats)
        for each in emitted:
            stream = self._streams.get(each.request)
            if stream is not None:
                stream.put(each)
                if each.is_done:
                    del self._streams[each.request]

    def _fail_streams(self, error: ApiError) -> None:
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()

    def _failed(self, reason: str) -> None:
        self.failure = reason
        for command in self._taken(wait=False):
            if isinstance(command, _Add):
                self._added(command, [], UserError(f"the engine failed: {reason}"))
            elif command is not None and not isinstance(command, _Cancel):
                _settle(lambda settle: settle(), command.future, None, UserError(reason))
        self._fail_streams(ApiError(500, f"the engine failed: {reason}", code="engine_failed"))

    # --- The thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            LOG.exception("the engine failed")
            self._post(self._failed, f"{type(error).__name__}: {error}"[:500])

    def _work(self) -> None:
        swap: _Swap | None = None
        held: list[_Add] = []
        while True:
            has_work = self.engine.has_work() and (not self.is_paused or swap is not None)
            if swap is not None and not has_work:
                self._swapped(swap)
                for add in held:
                    self._take(add)
                swap, held = None, []
                continue
            for command in self._taken(wait=not has_work):
                if command is None:
                    return
                if isinstance(command, _Swap) and swap is None:
                    swap = command
                elif isinstance(command, _Swap):
                    _settle(
                        self._post, command.future, None, UserError("weights are being updated")
                    )
                elif isinstance(command, _Add) and swap is not None:
                    held.append(command)
                else:
                    self._take(command)
            if self.engine.has_work() and (not self.is_paused or swap is not None):
                emitted = self.engine.step()
                self._post(self._deliver, emitted, self.engine.stats())

    def _taken(self, *, wait: bool) -> list[Any]:
        commands = [self._commands.get()] if wait else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def _take(self, command: Any) -> None:
        if isinstance(command, _Cancel):
            self.engine.cancel(command.number)
            return
        if isinstance(command, _Call):
            try:
                value, error = command.run(self.engine), None
            except Exception as raised:
                value, error = None, raised
            _settle(self._post, command.future, value, error)
            return
        numbers: list[int] = []
        try:
            for request in command.requests:
                numbers.append(self.engine.add(request))
        except UserError as error:
            for number in numbers:
                self.engine.cancel(number)
            self._post(self._added, command, [], error)
        else:
            self._post(self._added, command, numbers, None)

    def _swapped(self, swap: _Swap) -> None:
        try:
            self.engine = swap.make(self.engine)
        except Exception as error:
            _settle(self._post, swap.future, None, error)
        else:
            _settle(self._post, swap.future, None, None)


def _settle(
    post: Callable[..., None],
    future: "asyncio.Future[Any] | None",
    value: Any,
    error: BaseException | None,
) -> None:
    """Gives a future on the loop its value or error; None: nobody waits."""
    if future is None:
        return

    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    post(settle)
