"""The record of a run on the host: the log, the alarms, hooks, the progress bar.

Of several processes all watch the alarms, so that they stop together; the first does the rest.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from checkpoint.orbax_store import CheckpointStore
from configs.base import RunConfig
from parallel.distributed import is_first
from train.metrics import Alarms, Line, MetricsLog, TrainingAlarm, logged_num_experts, make_line
from train.pending import Measured
from train.progress import ProgressBar
from train.step_cost import StepCost

Hook = Callable[[int, Line], None]
"""Called with a step and its line of metrics.jsonl, on the first process; for what a user logs
elsewhere."""


class Recorder:
    """Keeps the record of a run; a context manager, which closes it."""

    def __init__(
        self,
        run: RunConfig,
        run_dir: Path,
        store: CheckpointStore,
        mesh: Mesh,
        hooks: Sequence[Hook],
    ) -> None:
        """Opens the log, less the lines after the newest checkpoint.

        Args:
          store: the run's checkpoints, for what an alarm says of them.
        """
        self.run, self.store, self.hooks = run, store, hooks
        self._cost = StepCost(run, mesh.devices)
        self._alarms = Alarms(run.alarms, logged_num_experts(run.model))
        self._validation = ""
        self._open = contextlib.ExitStack()
        self._is_first = is_first()
        if self._is_first:
            done = store.latest_step or 0
            self._log = MetricsLog(run_dir / "metrics.jsonl", resume_step=done)
            self._open.callback(self._log.close)
            self._bar = ProgressBar(run.name, total=run.steps, done=done)
            self._open.enter_context(self._bar)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def record(self, measured: Iterable[Measured]) -> None:
        """
        Raises:
          TrainingAlarm: of the first of these steps that gives one; it and those before it are in
            the log.
        """
        for step, metrics, seconds, waited in measured:
            tokens = self.run.tokens_per_step
            sources = [part.source for part in self.run.data.mixture]
            line = make_line(
                step, metrics, seconds, self.run.steps, tokens, self.run.model, sources
            )
            line |= self._cost.line(seconds, waited)
            if self._is_first:
                self._log.append(line)
            self._check(line)
            if self._is_first:
                for hook in self.hooks:
                    hook(step, line)
                self._show(line)

    def _check(self, line: Line) -> None:
        try:
            self._alarms.check(line)
        except TrainingAlarm as alarm:
            good = self.store.latest_step
            kept = (
                f"the last checkpoint before it is at step {good}"
                if good
                else "no checkpoint came before"
            )
            raise TrainingAlarm(f"{alarm}; {kept}, in {self.store.directory}") from None

    def _show(self, line: Line) -> None:
        if "validation_loss" in line:
            self._validation = f"  validation {line['validation_loss']:.3f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(line["step"], f"loss {line['loss']:.3f}{self._validation}  {speed}")
