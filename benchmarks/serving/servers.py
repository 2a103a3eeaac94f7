"""Servers as processes of their own: ours with other options, llama.cpp's."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import machine
from benchmarks.generation import llama_peer
from benchmarks.generation.programs import (
    ROOT,
    converted,
    llama_file,
    missing,
    our_environment,
)
from formats.gguf.writer import Quantization
from infer.convert import Conversion
from infer.sources import Source

LLAMA = "llama.cpp"
WRITTEN: dict[str, Quantization] = {"bfloat16": "F16", "int8": "Q8_0"}
"""Formats of a file with as many bits, by that of our weights: those that we write ourselves."""
QUANTIZED = {"float32": "F32", "int4": "Q4_0", "int4_affine": "Q4_1"}
"""And those that llama.cpp makes of the file of 16 bits."""
START_SECONDS = 1800.0


class ServerFailure(Exception):
    """A server that did not start: its last words."""


@dataclass(frozen=True)
class Command:
    """How a server is started."""

    name: str
    arguments: tuple[str, ...]
    port: int | None = None
    """Where it will listen; None: it says so."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that its requests need, so that texts have the length that was asked for."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """One that answers."""

    name: str
    url: str
    extra: dict[str, Any]
    start_seconds: float
    """From the process's beginning until requests are welcome."""
    started: dict[str, float]
    """What ours says that its start took, in seconds by part."""


def our_command(name: str, source: Source, options: Sequence[str], **environment: str) -> Command:
    """Ours, with options of `moesaic serve`."""
    arguments = (sys.executable, "-m", "scripts.serve", str(source.path.absolute()))
    arguments += ("--port", "0", "--served-name", "bench", *options)
    return Command(name, arguments, extra={"ignore_eos": True}, environment=environment)


def llama_command(
    source: Source, folder: Path, weights: str, *, rows: int, length: int
) -> tuple[Command | None, str]:
    """llama.cpp's server with the model in as many bits; or None, and why there is none here.

    `llama-server` where it is installed, else that of llama-cpp-python, which answers one request
    after the other.
    """
    binary = shutil.which("llama-server")
    if binary is None:
        reason = missing(sys.executable, os.environ, "llama_cpp.server.app")
        if reason:
            return (
                None,
                f"{reason}: install llama-server, or pip install 'llama-cpp-python[server]'",
            )
    kind = WRITTEN.get(weights) or QUANTIZED.get(weights)
    if kind is None:
        return None, f"it has no format like --weights {weights}"
    path, reason = _file(source, folder, weights, kind)
    if path is None:
        return None, reason
    port, threads = _free_port(), str(machine.cores())
    if binary is not None:
        sizes = ("-np", str(rows), "-c", str(rows * length), "-t", threads)
        arguments = (binary, "-m", str(path), "--port", str(port), *sizes)
        # It would find prompts of the rounds before; ours is asked with a salt.
        extra: dict[str, Any] = {"ignore_eos": True, "cache_prompt": False}
    else:
        sizes = ("--n_ctx", str(length), "--n_threads", threads)
        arguments = (sys.executable, "-m", "llama_cpp.server", "--model", str(path))
        arguments += ("--port", str(port), *sizes)
        extra = {"logit_bias": {str(i): -100 for i in source.tokenizer().eos_ids}}
    return Command(f"{LLAMA} {kind}", arguments, port, extra), ""


def _file(source: Source, folder: Path, weights: str, kind: str) -> tuple[Path | None, str]:
    """The model as a GGUF of this kind; or None, and why there is none."""
    path = folder / f"{kind}.gguf"
    if weights in QUANTIZED:
        floats, reason = llama_file(source, folder)
        if floats is None:
            return None, reason
        llama_peer.quantize(floats, path, kind, machine.cores())
        return path, ""
    reason = converted(source, path, Conversion(to="gguf", quantization=WRITTEN[weights]))
    return (None, reason) if reason else (path, "")


@contextlib.contextmanager
def started(command: Command) -> Iterator[Server]:
    """The server, until the context is left.

    Raises:
      ServerFailure: it ended before it was ready.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**our_environment(), **command.environment},
            stdout=said,
            stderr=log,
        )
        try:
            url = _wait(command, process, said, log, began)
            seconds = time.perf_counter() - began
            yield Server(command.name, url, dict(command.extra), seconds, _started(log))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(
    command: Command, process: "subprocess.Popen[bytes]", said: Any, log: Any, began: float
) -> str:
    while process.poll() is None and time.perf_counter() - began < START_SECONDS:
        time.sleep(0.02)
        if command.port is not None:
            url = f"http://127.0.0.1:{command.port}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    return url
        else:
            said.seek(0)
            found = re.search(r"is served at (http://\S+?),", said.read())
            if found is not None:
                return found[1]
    log.seek(0)
    words = log.read().strip().splitlines() or ["it said nothing"]
    raise ServerFailure(f"{command.name} did not start: {words[-1][:300]}")


def _started(log: Any) -> dict[str, float]:
    """What our server's log says of its start."""
    log.seek(0)
    for line in log.read().splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "started":
                return event["seconds"]
    return {}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
