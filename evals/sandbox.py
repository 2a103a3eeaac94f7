"""Runs a Python program that a model wrote: no network, no file of yours, bounded in what it takes.

What stops what: namespaces of bubblewrap (network, processes, files outside), a read-only system
and a scratch of bounded size (disk), limits of the kernel (memory, processes, file size, open
files), a seccomp filter (ptrace, new namespaces, mounts), and this process, which ends the program
when its time is over or it has written too much. It is a wall of the kernel, no machine of its own:
a fault in the kernel is a hole in it.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.checks import UserError
from evals.sandbox_command import (
    ENVIRONMENT,
    INSTALL,
    SCRATCH,
    Limits,
    find_bubblewrap,
    launched,
    sandboxed,
)
from evals.seccomp import seccomp_filter

WATCH_SECONDS = 0.02
"""Between two looks at what the program holds."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Ended = Literal["exit", "signal", "time", "memory", "files", "output"]
"""By itself; by a signal, such as a limit's; or by us: its time was over, all processes together
held too much memory, the scratch too many files, it had written too much."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended and what it wrote."""

    ended: Ended
    code: int
    """Exit code, or the signal's number."""
    stdout: str
    stderr: str
    seconds: float
    """From the launcher's end to the program's."""

    @property
    def is_success(self) -> bool:
        return self.ended == "exit" and self.code == 0

    def reason(self) -> str:
        """Why it did not succeed, in a few words; empty where it did."""
        if self.is_success:
            return ""
        match self.ended:
            case "exit":
                lines = self.stderr.strip().splitlines()
                return lines[-1] if lines else f"exit code {self.code}"
            case "signal":
                return f"ended by {signal.Signals(self.code).name}"
            case "time":
                return f"not done after {self.seconds:.1f} s"
            case "memory":
                return "too much memory"
            case "files":
                return "too many files"
            case "output":
                return "too much output"


def run_program(text: str, limits: Limits | None = None, *, unprotected: bool = False) -> Outcome:
    """Runs a Python program and waits for its end.

    Args:
      unprotected: with the rights of this process, without bubblewrap: the limits of the kernel
        and the clock still hold, nothing else does.
    Raises:
      UserError: bubblewrap is missing or can't start here.
    """
    limits = limits or Limits()
    bubblewrap = None if unprotected else find_bubblewrap()
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(_in_memory("program", text.encode(errors="surrogatepass")))
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        passed = [program, writer]
        if bubblewrap is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moesaic-"))
            path = f"/proc/self/fd/{program}"
            command = launched(limits, started=writer, program=path, is_alone=False)
            environment = ENVIRONMENT | {"HOME": folder, "TMPDIR": folder}
        else:
            folder, environment, seccomp = "/", {}, None
            code = seccomp_filter()
            if code is not None:
                seccomp = stack.enter_context(_in_memory("seccomp", code))
                passed.append(seccomp)
            command = sandboxed(
                bubblewrap, limits, program=program, started=writer, seccomp=seccomp
            )
        try:
            process = _start(command, passed, folder, environment)
        finally:
            os.close(writer)
        return _supervise(process, limits, reader)


@contextlib.contextmanager
def _in_memory(name: str, content: bytes) -> Iterator[int]:
    """A file descriptor from which the content is read."""
    descriptor = os.memfd_create(name)
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _start(
    command: Sequence[str], passed: Sequence[int], folder: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=passed,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _supervise(process: subprocess.Popen[bytes], limits: Limits, started: int) -> Outcome:
    """Waits for the program's end, or ends it."""
    began = time.monotonic()
    deadline = began + limits.seconds
    stopped: Ended | None = None
    written: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, "stdout")
            selector.register(process.stderr, selectors.EVENT_READ, "stderr")
            while stopped is None and (selector.get_map() or process.poll() is None):
                patience = min(WATCH_SECONDS, max(deadline - time.monotonic(), 0.0))
                if selector.get_map():
                    stopped = _read(selector, written, limits, patience)
                else:
                    _wait(process, patience)
                stopped = stopped or _overstepped(process.pid, limits, deadline)
        seconds = time.monotonic() - began
    finally:
        _end(process)
    if stopped is None and not os.read(started, 1):
        raise _cannot_start(written["stderr"].decode(errors="replace"))
    code = process.returncode
    ended: Ended = stopped or ("exit" if 0 <= code <= 128 else "signal")
    return Outcome(
        ended=ended,
        code=code - 128 if code > 128 else abs(code),  # bubblewrap's way, and Python's
        stdout=written["stdout"].decode(errors="replace"),
        stderr=written["stderr"].decode(errors="replace"),
        seconds=seconds,
    )


def _wait(process: subprocess.Popen[bytes], patience: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


def _read(
    selector: selectors.BaseSelector,
    written: dict[str, bytearray],
    limits: Limits,
    patience: float,
) -> Ended | None:
    """Takes what the program has written; waits for it so many seconds."""
    for key, _ in selector.select(patience):
        chunk = os.read(key.fd, 2**16)
        if not chunk:
            selector.unregister(key.fileobj)
        written[key.data] += chunk
    room = limits.output_bytes
    if sum(map(len, written.values())) <= room:
        return None
    for buffer in written.values():
        del buffer[room:]
        room -= len(buffer)
    return "output"


def _overstepped(pid: int, limits: Limits, deadline: float) -> Ended | None:
    """Which of the bounds that no limit of the kernel holds is passed."""
    if time.monotonic() >= deadline:
        return "time"
    processes = list(_descendants(pid))
    if sum(map(_resident_bytes, processes)) > limits.memory_bytes:
        return "memory"
    if processes and _num_files(processes[-1]) > limits.scratch_files:
        return "files"
    return None


def _descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # it has ended
        return
    for task in tasks:
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):  # it has ended
        return 0


def _num_files(pid: int) -> int:
    """Files in the scratch that a process sees; 0 where it can't be seen."""
    try:
        found = os.statvfs(f"/proc/{pid}/root{SCRATCH}")
    except OSError:
        return 0
    return found.f_files - found.f_ffree


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and all that it has started; in the sandbox they go with its first
    process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _cannot_start(said: str) -> UserError:
    lines = said.strip().splitlines() or ["nothing was said of why"]
    return UserError(
        f"the sandbox can't start here ({lines[-1]}): bubblewrap ({INSTALL}) needs user namespaces "
        "or root's rights, which some containers withhold; --unprotected runs the code with your "
        "own rights"
    )
