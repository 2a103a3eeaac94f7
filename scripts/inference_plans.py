"""Plans of how to serve, for verbs: the device, the model by any of its names, what is settled."""

import argparse
from pathlib import Path

from benchmarks.planned import Planned, Shape
from configs.architecture import ModelConfig
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.cli import known_runs, named_run
from configs.experiment_file import parse_target
from infer.engine import EngineOptions
from infer.hardware import Hardware, from_sheet, this_machine
from infer.sources import Source, open_source
from planning.available import available_memory
from planning.inference import InferencePlan, Wanted, make_inference_plan
from planning.inference_cost import Costs
from scripts import command
from scripts.model_options import LENGTH
from scripts.named_runs import with_source_model
from train.progress import ProgressBar

HERE = "here"


def found_hardware(device: str) -> Hardware:
    """The device by its data sheet, or this machine's own."""
    if device != HERE:
        return from_sheet(device)
    bar: ProgressBar | None = None

    def on_measure(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = ProgressBar("measuring this machine", total=total, unit="formats")
            bar.__enter__()
        bar.update(done)

    try:
        return this_machine(available_memory(), cache_file(), on_measure)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def cache_file() -> Path | None:
    """What keeps measurements; None where the user has no folder for it."""
    try:
        return command.cache_folder() / "hardware.json"
    except OSError:
        return None


def model_of(name: str) -> tuple[ModelConfig, ExecutionConfig, bool]:
    """The model of a run's name, of FILE.py:NAME, or of any source, and whether its file has four
    bits; nothing is loaded.

    Raises:
      UserError: there is none of that name.
    """
    if name in known_runs() or parse_target(name) is not None:
        run = with_source_model(named_run(name))
        return run.model, run.execution, False
    if not Path(name).exists() and name != "smollm2" and "@" not in name:
        named_run(name)  # which says what there is
    source = open_source(name)
    return source.config, source.execution, source.is_in_four_bits


def plan_of(name: str, hardware: Hardware, arguments: argparse.Namespace) -> InferencePlan:
    """
    Args:
      arguments: of scripts.plan_inference.
    Raises:
      UserError: a context that the model does not have, or settings that are impossible.
    """
    config, execution, is_in_four_bits = model_of(name)
    longest = config.context_length
    context = min(LENGTH, longest) if arguments.context is None else arguments.context
    if not 2 <= context <= longest:
        raise UserError(
            f"--context {context} must lie between 2 and the model's context_length={longest}"
        )
    latency = arguments.latency_ms
    wanted = Wanted(
        context=context,
        clients=arguments.clients,
        latency=None if latency is None else latency / 1e3,
        budget=arguments.quality_budget,
        weights=arguments.weights,
        kv=arguments.kv,
        rows=arguments.max_rows,
        is_in_four_bits=is_in_four_bits,
    )
    return make_inference_plan(Costs(config, execution, hardware, context), wanted)


def settle(source: Source, arguments: argparse.Namespace) -> None:
    """See scripts.model_options.settle_auto.

    Raises:
      UserError: nothing fits.
    """
    longest, rows = source.config.context_length, getattr(arguments, "max_rows", 1)
    context = getattr(arguments, "max_length", None) or min(LENGTH, longest)
    wanted = Wanted(
        context=context,
        clients=rows,
        latency=getattr(arguments, "step_seconds", None),
        kv=arguments.kv,
        is_in_four_bits=source.is_in_four_bits,
    )
    costs = Costs(source.config, source.execution, found_hardware(HERE), context)
    plan = make_inference_plan(costs, wanted)
    chosen = plan.require_chosen()
    arguments.weights, arguments.kv, arguments.max_rows = chosen.weights, chosen.kv, chosen.rows
    print(
        f"auto: weights {chosen.weights}, keys and values {chosen.kv}, "
        f"{chosen.rows} row(s) (moesaic plan-inference {source.name} says why)",
        flush=True,
    )


def planned_for(source: Source, hardware: Hardware, shape: Shape) -> Planned:
    """
    Raises:
      UserError: nothing fits.
    """
    costs = Costs(source.config, source.execution, hardware, shape.length)
    wanted = Wanted(
        context=shape.length, clients=shape.clients, is_in_four_bits=source.is_in_four_bits
    )
    one = make_inference_plan(costs, wanted).require_chosen()
    options = EngineOptions(
        max_rows=one.rows,
        max_length=shape.length,
        kv_dtype=one.kv,
        piece=one.piece,
        page_size=one.page_size,
    )
    return Planned(one.weights, options)
