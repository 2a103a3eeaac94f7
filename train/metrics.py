"""The log of a run (metrics.jsonl) and the alarms that read it.

A line per step: "step" (steps done, from 1), "loss", "tokens_per_second", "learning_rate",
"grad_norm", "seconds", what the step took of the devices (train/step_cost.py: "model_tflops",
"mfu", "data_wait", "peak_memory"), the objective's own terms, and per MoE layer, in the order of
the layers and multi-token modules last, lists under "load_cv", "load_cv_floor", "max_violation",
"dead_experts", "peak_load", "router_entropy", "z_loss" (unweighted), "mean_k", "overflow_rows",
"bytes_moved"; on some steps
"expert_load", a list per layer of each expert's load over the mean. Layers that choose their tokens
list "chosen_fraction" and "predictor_accuracy"; with early exit, "exit_cross_entropy" has the exits
that the step supervised, by the number of layers before them. With optimizer.skip_above, "skipped"
is 1 for a step that changed nothing. Steps after which the run was
measured on held-out text have "validation_loss" and "validation_bits_per_byte" (see
train/validation.py). Runs on a mixture have "source_losses" and "validation_source_losses", the
cross-entropy of each source's targets. A number that is not finite is null.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.architecture import ModelConfig
from configs.base import AlarmConfig
from configs.checks import UserError, require
from configs.serialization import finite_json
from formats.small_files import UNLIMITED, read_small_file
from model.early_exit import exit_layers
from model.moe_layers import moe_layers

LOAD_RECORDS = 200
"""Steps of a run that log every expert's load: enough for a picture, whatever the run's length."""

Line = dict[str, Any]


class TrainingAlarm(RuntimeError):
    """The run stopped itself; the message says why, and which checkpoint is the last good one."""


class MetricsLog:
    """Appends lines to metrics.jsonl; lines after the step a run resumes from are dropped."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """
        Raises:
          UserError: the file holds a line that is not JSON before the step to resume from.
        """
        self.path = path
        kept: list[Line] = []
        if resume_step and path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        elif resume_step:
            print(f"note: {path} is missing: it begins again after step {resume_step}", flush=True)
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(finite_json(line) + "\n" for line in kept))
        os.replace(rewritten, path)
        self._file = path.open("a", buffering=1)

    def append(self, line: Line) -> None:
        self._file.write(finite_json(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_lines(
    path: Path, columns: Sequence[str] = ("step",), optional: Sequence[str] = ()
) -> list[Line]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out, null is NaN.

    Args:
      columns: what each line needs, as numbers.
      optional: what a line may lack, but has as a number if at all.
    Raises:
      UserError: no such file, or another line that is not JSON, lacks a column or has no number
        in it.
    """
    mend = "restore the file, or move it away and go on without"
    try:
        texts = read_small_file(path, mend, UNLIMITED).splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run has not been trained here") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        where = f"{path} line {number}"
        try:
            line = _with_nan(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(texts):
                break
            raise UserError(f"{where} is not JSON ({error}): {mend}") from error
        require(isinstance(line, dict), f"{where} is {text[:60]}, expected an object: {mend}")
        for name in (*columns, *(name for name in optional if name in line)):
            value = line.get(name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(is_number, f"{where} has {name}={value!r:.60}, expected a number: {mend}")
        lines.append(line)
    return lines


def _with_nan(tree: Any) -> Any:
    """Its numbers, where JSON has null for those that were not finite."""
    if isinstance(tree, dict):
        return {name: _with_nan(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_nan(x) for x in tree]
    return math.nan if tree is None else tree


def make_line(
    step: int,
    metrics: dict[str, Any],
    seconds: float,
    run_steps: int,
    tokens: int,
    model: ModelConfig,
    sources: Sequence[str] = (),
) -> Line:
    """One line of the log from a step's metrics (see train/step.py), fetched to the host.

    Args:
      sources: names of a mixture's, in its order.
    """
    apart = ("router", "depth", "exits", "source", "validation_source")
    line: Line = {name: float(x) for name, x in metrics.items() if name not in apart}
    line = {"step": step, **line, "seconds": seconds, "tokens_per_second": tokens / seconds}
    line |= _by_source(metrics, sources)
    layers = _in_layer_order(metrics["router"], model)
    with_load = step % max(run_steps // LOAD_RECORDS, 1) == 0
    for name in layers[0] if layers else ():
        values = [layer[name] for layer in layers]
        if name != "expert_load":
            line[name] = [round(float(x), 5) for x in values]
        elif with_load:
            line[name] = [[round(float(x), 3) for x in load_E] for load_E in values]
    routed = _in_layer_order(metrics["depth"], model)
    for name in routed[0] if routed else ():
        line[name] = [round(float(layer[name]), 5) for layer in routed]
    return line | _exits_line(metrics, model)


def _by_source(metrics: dict[str, Any], sources: Sequence[str]) -> Line:
    """The mean cross-entropy of each source's targets; nothing of one that had none this time."""
    line = {}
    names = {"source": "source_losses", "validation_source": "validation_source_losses"}
    for name, shown in names.items():
        if name in metrics:
            columns = zip(sources, *np.asarray(metrics[name]), strict=True)
            line[shown] = {x: round(float(sum_ / n), 5) for x, sum_, n in columns if n > 0}
    return line


def _exits_line(metrics: dict[str, Any], model: ModelConfig) -> Line:
    if "exits" not in metrics:
        return {}
    layers_P = exit_layers(model) + 1
    pairs = zip(
        *(np.asarray(metrics["exits"][k]) for k in ("period", "cross_entropy")), strict=True
    )
    return {
        "exit_cross_entropy": {str(layers_P[p]): round(float(x), 5) for p, x in pairs if p >= 0}
    }


def _in_layer_order(
    by_name: dict[str, dict[str, Any]], model: ModelConfig
) -> list[dict[str, np.ndarray]]:
    """Metrics by name of the layers, stacked over the periods, as one dict per layer of the model
    that has any; multi-token modules come last.
    """
    host = {n: {k: np.asarray(v) for k, v in metrics.items()} for n, metrics in by_name.items()}
    pattern = [f"layer_{i}" for i in range(len(model.pattern)) if f"layer_{i}" in host]
    places = [(period, name) for period in range(model.num_periods) for name in pattern]
    places += [(0, name) for name in host if name not in pattern]
    return [{k: x[period] for k, x in host[name].items()} for period, name in places]


def logged_num_experts(model: ModelConfig) -> tuple[int, ...]:
    """The experts of each MoE layer, in the order in which the log lists layers."""
    layers = moe_layers(model).values()
    period = [layer.config.num_experts for layer in layers if layer.periods is not None]
    modules = [layer.config.num_experts for layer in layers if layer.periods is None]
    return (*(period * model.num_periods), *modules)


class Alarms:
    """Watches the log line by line; a load alarm must hold for some steps in a row."""

    def __init__(self, config: AlarmConfig, num_experts: Sequence[int]) -> None:
        """
        Args:
          num_experts: of each MoE layer, in the log's order: see `logged_num_experts`.
        """
        self.config, self.num_experts = config, num_experts
        self._dead_steps = self._collapsed_steps = self._skipped_steps = 0

    def check(self, line: Line) -> None:
        """
        Raises:
          TrainingAlarm: a loss or gradient that is not finite, dead experts, or collapse.
        """
        for name in ("loss", "grad_norm"):
            if line.get("skipped"):  # it changed nothing
                continue
            if not math.isfinite(line[name]):
                raise TrainingAlarm(
                    f"{name} is {line[name]} at step {line['step']}: lower "
                    "optimizer.learning_rate or "
                    "optimizer.clip_norm, or look at the data of this step"
                )
        self._skipped_steps = self._skipped_steps + 1 if line.get("skipped") else 0
        if self._skipped_steps >= self.config.patience:
            raise TrainingAlarm(
                f"the last {self._skipped_steps} steps were all skipped as spikes, up to step "
                f"{line['step']}: raise optimizer.skip_above, or lower optimizer.learning_rate"
            )
        if "dead_experts" not in line or line["step"] <= self.config.grace_steps:
            return
        peak = max(line["peak_load"])
        pairs = zip(line["dead_experts"], self.num_experts, strict=True)
        dead, experts = max(pairs, key=lambda pair: pair[0] / pair[1])
        is_dead = dead >= self.config.dead_fraction * experts
        is_collapsed = peak >= self.config.collapse_fraction
        self._dead_steps = self._dead_steps + 1 if is_dead else 0
        self._collapsed_steps = self._collapsed_steps + 1 if is_collapsed else 0
        advice = "raise router.load_balance_weight, or set alarms.* if this is meant"
        if self._dead_steps >= self.config.patience:
            raise TrainingAlarm(
                f"{dead:.0f} of {experts} experts of a layer have had less than a tenth "
                "of the mean "
                f"load for {self.config.patience} steps, up to step {line['step']}: {advice}"
            )
        if self._collapsed_steps >= self.config.patience:
            raise TrainingAlarm(
                f"one expert has been chosen by {peak:.0%} of all tokens for "
                f"{self.config.patience} steps, up "
                f"to step {line['step']}: {advice}"
            )
