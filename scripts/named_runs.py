"""The run that a verb's command line names: by its function, or by its folder, to go on with it."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from checkpoint.run_directory import EXPERIMENT, read_run
from configs.base import InitConfig, RunConfig, UpcycleConfig
from configs.checks import require
from configs.cli import load_run, with_overrides
from configs.experiment_file import Target, object_of, parse_target, read_source
from configs.models import of_source
from infer.sources import open_source
from model.upcycle import upcycled_config
from scripts import command
from train.losses import ChunkLoss, reporting_cross_entropy


def chosen_run(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """The run with its overrides; a folder's has the settings that it was started with.

    Args:
      arguments: of `command.split_run_arguments`.
    Raises:
      UserError: as `load_run`; a folder and another --run-dir.
    """
    if not command.is_run_folder(arguments.run):
        run = load_run(arguments.run, overrides, arguments.own_options)
        return with_source_model(run)
    folder = Path(arguments.run)
    require(
        arguments.run_dir == folder,
        f"{folder} is a run to go on with, --run-dir {arguments.run_dir} another folder: leave it "
        "out, or name the run's function to train it anew",
    )
    run = read_run(folder)
    return with_overrides(run, overrides, str(folder), own_options=arguments.own_options)


def with_source_model(run: RunConfig) -> RunConfig:
    """The run with the model and the tokenizer of its init.source, where it takes them from there.

    Raises:
      UserError: the source can't be read, or the run states a model of its own, too.
    """
    if run.init.architecture == "run":
        return run
    require(
        run.model == of_source(),
        "init.architecture='source' takes the model from init.source, and this run states one: "
        "leave --model.* out, of a run of your own with model=configs.models.of_source(), or set "
        "init.architecture='run'",
    )
    assert run.init.source is not None
    source = open_source(run.init.source)
    data = dataclasses.replace(run.data, tokenizer=run.data.tokenizer or run.init.source)
    model = source.config
    if run.init.upcycle:
        model = upcycled_config(model, **dataclasses.asdict(run.init.upcycle))
    if run.init.weights == "drawn":
        init = InitConfig()
    else:
        init = dataclasses.replace(run.init, architecture="run", upcycle=UpcycleConfig())
    return dataclasses.replace(run, model=model, data=data, init=init)


def own_loss(run: RunConfig, path: Path | None, folder: Path) -> ChunkLoss | None:
    """What the run's `objective` names in the user's own file; None where it names nothing.

    Args:
      path: of the file, where one was named.
      folder: of the run.
    Raises:
      UserError: no file was named, or there is nothing in it that can be called.
    """
    if run.objective is None:
        return None
    kept = folder / EXPERIMENT
    advice = f", such as --experiment {kept}, which it was started from" if kept.exists() else ""
    require(
        path is not None,
        f"{run.name} minimises {run.objective}, a function of a file of its own, and none is "
        f"executed unless it is named: train FILE.py:NAME, or give --experiment FILE.py{advice}",
    )
    assert path is not None
    found = object_of(Target(path, run.objective))
    require(callable(found), f"{path}: objective={run.objective!r} is {found!r:.60}, no function")
    return reporting_cross_entropy(found)


def experiment_text(arguments: argparse.Namespace) -> str | None:
    """The user's own file that the run comes from, to be kept beside it."""
    target = parse_target(arguments.run)
    return None if target is None else read_source(target)
