"""The model that scripts.evaluate is asked about, and the text it is measured on."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from checkpoint.run_directory import BEST, read_run
from configs.checks import require
from evals.http_model import http_model, is_url
from evals.local_model import BATCH_TOKENS
from evals.opening import FOLDER as EVALUATIONS
from evals.opening import (
    Loaded,
    evaluation_of,
    load_run,
    open_text,
    run_evaluation,
    text_folder,
    weights_identity,
)
from evals.results import FILE
from evals.run import Evaluation, Settings, plain_name
from evals.samples import Task
from infer.sources import Source, open_source
from model.unstacked import unstack
from scripts.model_options import chosen_source, description, load_model
from scripts.sources import initial_variables

FOLDER, SUFFIX, HELD_OUT = Path("runs/evals"), ".py", 0.01
LENGTH = 1024
"""Tokens that a model reads at once where its run does not say, at most."""
OF_TEXT = ("suffix", "held_out", "length", "folder")
OF_MODELS = ("initial", "text", *OF_TEXT)
"""Options that need the model here, and not behind a server."""


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """--initial, --text and what goes with it."""
    parser.add_argument("--initial", action="store_true", help="the weights the run began with")
    parser.add_argument("--text", help="'stdlib', a folder or a file; a run has its own")
    parser.add_argument("--suffix", help="of a folder's files to read (.py)")
    parser.add_argument("--held-out", type=float, help="share of the text (0.01)")
    parser.add_argument("--length", type=int, help=f"tokens read at once (at most {LENGTH:,})")
    parser.add_argument("--folder", type=Path, help=f"of texts that were read ({FOLDER})")


@dataclass(frozen=True)
class Opened:
    """A model that was found: its evaluation, its name, and its folder or file, if it has one."""

    evaluation: Evaluation
    name: str
    path: Path | None


def open_named(
    name: str,
    arguments: argparse.Namespace,
    tasks: Sequence[Task],
    mesh: Mesh | None,
    output: Path | None,
) -> Opened:
    """A source, or the model that a server has at this address.

    Raises:
      UserError: options that do not go together, or a model that can't be read or reached.
    """
    if not is_url(name):
        source = chosen_source(name, arguments)
        evaluation = open_evaluation(source, arguments, tasks, mesh, output)
        return Opened(evaluation, source.name, source.path)
    given = [option for option in OF_MODELS if getattr(arguments, option) not in (None, False)]
    given += ["batch_tokens"] if arguments.batch_tokens != BATCH_TOKENS else []
    require(
        not given and not description(arguments),
        f"{name} is a server, which says itself how it computes: leave "
        f"{', '.join(given) or description(arguments)} out",
    )
    model = http_model(name)
    described = model.describe()
    folder = output or EVALUATIONS / plain_name(described.name)
    evaluation = Evaluation(
        model, described, _settings(arguments, tasks), folder, may_set_aside=output is None
    )
    return Opened(evaluation, name, None)


def check_named(name: str | None) -> None:
    """
    Raises:
      UserError: a model that is to be compared with later, and can't be read.
    """
    if name is not None and not is_url(name):
        open_source(name)


def _settings(arguments: argparse.Namespace, tasks: Sequence[Task]) -> Settings:
    require(
        not arguments.unprotected or any(task.runs_code for task in tasks),
        "--unprotected is for tasks that run a model's code, and none of these does: leave it out",
    )
    return Settings(arguments.limit, arguments.num_fewshot, arguments.seeds, arguments.unprotected)


def open_evaluation(
    source: Source,
    arguments: argparse.Namespace,
    tasks: Sequence[Task],
    mesh: Mesh | None,
    output: Path | None,
) -> Evaluation:
    """The source in memory, in the format and on the mesh that were asked for.

    Raises:
      UserError: options that do not go together, or a model that can't be read.
    """
    settings = _settings(arguments, tasks)
    for_decoding = any(task.output_type == "generate_until" for task in tasks)
    if source.kind == "run" and arguments.text is None:
        return _run(source, arguments, settings, mesh, output, for_decoding=for_decoding)
    evaluation = _on_text(source, arguments, settings, mesh, output, for_decoding=for_decoding)
    if any(task.needs_held_out for task in tasks):
        return evaluation
    return dataclasses.replace(evaluation, copies=())  # they lie with the text


def _run(
    source: Source,
    arguments: argparse.Namespace,
    settings: Settings,
    mesh: Mesh | None,
    output: Path | None,
    *,
    for_decoding: bool,
) -> Evaluation:
    """A run on its own text."""
    name, run_dir = _name_of(source, arguments), source.path
    for option in OF_TEXT:
        value = getattr(arguments, option)
        require(
            value is None,
            f"--{option.replace('_', '-')} {value} goes with --text: a run is measured on its own "
            "text, as it was read",
        )
    if arguments.initial:
        require(not name, f"--initial is scored as it is: leave {name} out")
        initial = initial_variables(read_run(run_dir), run_dir)
        loaded = load_run(run_dir, initial, for_decoding=for_decoding)
    elif name:
        loaded = _loaded(source, arguments, mesh, for_decoding=for_decoding)
    else:
        loaded = load_run(run_dir, for_decoding=for_decoding)
    return run_evaluation(
        run_dir,
        loaded,
        settings,
        output=output,
        batch_tokens=arguments.batch_tokens,
        is_initial=arguments.initial,
    )


def _on_text(
    source: Source,
    arguments: argparse.Namespace,
    settings: Settings,
    mesh: Mesh | None,
    output: Path | None,
    *,
    for_decoding: bool,
) -> Evaluation:
    """Any source, with a text for the tasks that need one."""
    require(
        not arguments.initial,
        f"--initial is of a run on its own text: leave it out for {source.name}",
    )
    longest = source.config.context_length
    length = min(LENGTH, longest) if arguments.length is None else arguments.length
    require(2 <= length <= longest, f"--length {length} must be from 2 to the model's {longest}")
    fraction = HELD_OUT if arguments.held_out is None else arguments.held_out
    require(
        0 < fraction < 1, f"--held-out {fraction} must lie between 0 and 1: a share of the text"
    )
    text, suffix = arguments.text or "stdlib", arguments.suffix or SUFFIX
    kept = text_folder(source, text, arguments.folder or FOLDER)
    loaded = _loaded(source, arguments, mesh, for_decoding=for_decoding)
    return evaluation_of(
        source,
        loaded,
        settings,
        window=length,
        held_out=lambda: open_text(source, text, suffix, fraction, kept),
        copy=kept / FILE,
        output=output,
        name=f"on_{plain_name(text)}" if arguments.text else "",
        batch_tokens=arguments.batch_tokens,
    )


def _loaded(
    source: Source, arguments: argparse.Namespace, mesh: Mesh | None, *, for_decoding: bool
) -> Loaded:
    is_run = source.kind == "run"
    model, variables = load_model(source, arguments, mesh, for_decoding=for_decoding and not is_run)
    weights = weights_identity(source, model, variables)
    if for_decoding:
        model, variables = unstack(model, variables)
    name = _name_of(source, arguments)
    return Loaded(model, variables, weights, mesh, arguments.weights, name)


def _name_of(source: Source, arguments: argparse.Namespace) -> str:
    """Of what is not the run's newest weights in their own format, on one device."""
    parts = [source.checkpoints if source.checkpoints == BEST else "", description(arguments)]
    return "_".join(part for part in parts if part)
