"""A program that is measured turn by turn, in a process of its own.

It says in one line of JSON what it is, then answers each name of a measure with tokens per second.
Only the standard library: peers import this file from other environments.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MARK = "BENCH "
"""Begins a line that is an answer; libraries print others."""


def serve(facts: Mapping[str, Any], measures: Mapping[str, Callable[[], float]]) -> None:
    """Tells the facts, then takes a measure for each line of stdin, until stdin ends."""
    print(MARK + json.dumps(dict(facts)), flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps(measures[line.strip()]()), flush=True)


@dataclass(frozen=True)
class Program:
    """One that can be measured."""

    name: str
    command: tuple[str, ...]
    cwd: Path
    environment: Mapping[str, str]
    is_peer: bool = True
    """Whether the comparison goes on without it where it can't be run."""


class WorkerFailure(RuntimeError):
    """The process died; the last line that it wrote to stderr."""


class Worker:
    """The process of a program that has said what it is."""

    def __init__(self, program: Program, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.program = program
        self._process, self._errors = process, errors
        self.facts: dict[str, Any] = self._answer()

    def take(self, measure: str) -> float:
        """Tokens per second.

        Raises:
          WorkerFailure: the process died.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before: the answer says so
            self._process.stdin.write(f"{measure}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or [f"exit code {code}"]
        raise WorkerFailure(f"{self.program.name} ended: {said[-1]}")


@contextlib.contextmanager
def started(program: Program) -> Iterator[Worker]:
    """The program's worker, which ends with the context.

    Raises:
      WorkerFailure: it died before it said what it is.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            program.command,
            cwd=program.cwd,
            env=dict(program.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Worker(program, process, errors)
        finally:
            process.kill()
