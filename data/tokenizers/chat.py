"""Chat templates of public models: messages in, the text that the model was trained to see out.

A template is a program that came with a file from somewhere. jinja2's sandbox keeps it from
attributes and long ranges, but neither from loops in loops nor from `'a' * 10**10`, which can't be
stopped from inside a thread. So it is rendered in a process of its own, started once and used by
all threads in turn, which the kernel kills when a rendering takes more than its share of processor
time and refuses memory beyond a bound. A rendering costs a fraction of a millisecond more for it.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from configs.checks import UserError

SECONDS = 2.0
"""Of processor time for one rendering; real templates take milliseconds."""

Messages = list[dict[str, Any]]


def render(
    messages: Messages,
    template: str,
    *,
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> str:
    """The conversation as the template writes it, special tokens spelt out.

    Args:
      messages: with "role" and "content"; made of what JSON has.
      bos, eos: how the special tokens are spelt.
      add_generation_prompt: whether the text ends where an answer begins.
      tools: JSON schemas of functions.
      variables: further ones that a template knows ("enable_thinking").
    Raises:
      UserError: a template that is malformed, fails, refuses these messages, reaches for what it
        may not have or takes too long.
    """
    values: dict[str, Any] = dict(variables or {})
    values |= {"messages": messages, "tools": tools, "documents": None}
    values |= {"bos_token": bos, "eos_token": eos, "add_generation_prompt": add_generation_prompt}
    request = {"template": template, "variables": values, "seconds": SECONDS}
    try:
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the messages are not made of what JSON has: {error}") from error
    reply = _WORKER.ask(line)
    if "text" not in reply:
        raise UserError(f"the chat template can't be rendered: {reply['error']}")
    return reply["text"]


class _Worker:
    """The process that renders, started when it is first needed and after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, str]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # an interrupt: its answer must not be the next one's
                self._stop()
                raise
            if reply.endswith("\n"):
                return json.loads(reply)
            return {"error": self._end(process)}

    def _running(self) -> subprocess.Popen[str]:
        """A process of our own: a fork of ours must not share its pipes."""
        is_ours = self._owner == os.getpid()
        if self._process is None or not is_ours or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("chat_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                env={},
            )
            self._owner = os.getpid()
        return self._process

    def _end(self, process: subprocess.Popen[str]) -> str:
        """Why it died, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        self._stop()
        if -process.returncode in (signal.SIGPROF, signal.SIGALRM):
            return f"it takes more than {SECONDS:g} s"
        return f"its process ended with status {process.returncode}"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()

    def close(self) -> None:
        with self._lock:
            self._stop()


_WORKER = _Worker()
atexit.register(_WORKER.close)
