"""Progress of long work: a bar with metrics on a terminal, a line now and then elsewhere."""

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Stopwatch:
    """Seconds of named stages, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.monotonic()
        self.seconds[stage], self._last = round(now - self._last, 1), now


class ProgressBar:
    """`with ProgressBar(...) as bar: bar.update(done, "loss 3.14")`."""

    def __init__(self, title: str, *, total: int, done: int = 0, unit: str = "steps") -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.console = Console()
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # when and at what: the first step compiles
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, metrics="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, done: int, metrics: str = "") -> None:
        """Shows that `done` of the total are done, with some metrics."""
        self.done = done
        self._progress.update(self._task, completed=done, metrics=metrics)
        now = time.monotonic()
        self._first = self._first or (now, done)
        is_due = now - self._last_line >= SECONDS_BETWEEN_LINES or done == self.total
        if not self.console.is_terminal and is_due:
            self._last_line = now
            began, first = self._first
            rate = (done - first) / max(now - began, 1e-9)
            left = f"  {(self.total - done) / rate:.0f} s left" if rate > 0 else ""
            line = f"{self.title}: {done}/{self.total} {self.unit}  {metrics}{left}"
            with contextlib.suppress(BrokenPipeError):  # `| head` must not cost a run its steps
                print(line, flush=True)
