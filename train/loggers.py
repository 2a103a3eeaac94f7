"""Hooks that carry the log on: TensorBoard's event files, and Weights & Biases
(MetricsConfig.loggers).

Both are optional packages; what they keep lies in the run's folder, and nothing is sent anywhere.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

from configs.base import RunConfig
from configs.checks import UserError
from configs.monitoring import Logger
from train.metrics import Line
from train.recorder import Hook

INSTALL = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Packages by logger."""


def numbers(line: Line) -> dict[str, float]:
    """The numbers of a line of the log by flat names; of the layers each its own."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, int | float):
            found[name] = float(value)
        elif isinstance(value, dict):
            found |= {f"{name}/{key}": float(x) for key, x in value.items()}
        elif isinstance(value, list) and all(isinstance(x, int | float) for x in value):
            found |= {f"{name}/layer_{i}": float(x) for i, x in enumerate(value)}
    found.pop("step", None)
    return found


@contextlib.contextmanager
def logger_hooks(run: RunConfig, run_dir: Path) -> Iterator[list[Hook]]:
    """A hook for each logger of the run; they are closed at the end.

    Raises:
      UserError: a package is not installed.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_opened(name, run, run_dir)) for name in run.metrics.loggers]


@contextlib.contextmanager
def _opened(name: Logger, run: RunConfig, run_dir: Path) -> Iterator[Hook]:
    module = _package(name)
    if name == "tensorboard":
        with contextlib.closing(module.SummaryWriter(str(run_dir / "tensorboard"))) as writer:

            def write(step: int, line: Line) -> None:
                for key, value in numbers(line).items():
                    writer.add_scalar(key, value, step)

            yield write
    elif name == "wandb":
        opened = module.init(
            mode="offline",
            dir=str(run_dir),
            project="moesaic",
            name=run.name,
            config=dataclasses.asdict(run),
        )
        try:
            yield lambda step, line: opened.log(numbers(line), step=step)
        finally:
            opened.finish()
    else:
        assert_never(name)


def _package(name: Logger) -> Any:
    package = INSTALL[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"metrics.loggers has {name!r}, and {package} is not installed: pip install {package}, "
            "or leave it out (metrics.jsonl has all of it)"
        ) from error
