"""Multiplies the experts of a trained run and trains on: the grown model begins as the same
function (but for --drop with copy).

    python -m scripts.grow runs/v31_nano --operator copy --steps 100
    python -m scripts.grow runs/deepseek --operator reserve --warmup 200 --drop 0.5 --steps 1000

The new run's folder (by default the old one's name with _grown) is a run like any other. Its
settings are the parent's, and other arguments override them (--optimizer.learning-rate 0.001). It
reads on in the data where its parent stopped, unless an override changes the order. With
--optimizer grown its optimiser goes on with the parent's moments (train/growth.py says which).
"""

import dataclasses
from pathlib import Path
from typing import get_args

from checkpoint.run_corpus import read_run_tokenizer
from checkpoint.run_directory import has_checkpoint, read_run
from configs.base import InitConfig
from configs.checks import require
from configs.cli import with_overrides
from infer.run_weights import load_model
from model.growth import Operator, grow, grown_config
from planning.available import require_memory
from scripts import command
from scripts.arguments import finite
from scripts.samples import sampler
from scripts.sources import describe_initial, parent_origin, require_same_tokenizer
from scripts.train import describe, finish
from train.growth import load_grown_optimizer_state
from train.loop import fit


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("parent", type=Path, help="folder of a trained run")
    parser.add_argument("--operator", choices=get_args(Operator), default="copy")
    parser.add_argument("--factor", type=int, default=2, help="experts each expert becomes")
    parser.add_argument("--steps", required=True, help="steps to train on")
    parser.add_argument("--warmup", type=int, help="reserve: steps over which the twins enter")
    parser.add_argument("--drop", type=finite, default=0.0, help="share of a twin's units redrawn")
    parser.add_argument("--optimizer", choices=("fresh", "grown"), default="grown")
    parser.add_argument("--run-dir", type=Path, help="folder of the new run")
    arguments, overrides = parser.parse_known_args(argv)
    parent = read_run(arguments.parent)
    how = (arguments.operator, arguments.factor)
    model = grown_config(parent.model, *how, warmup_steps=arguments.warmup)
    own = {"name": f"{parent.name}_grown", "model": model, "init": InitConfig(), "distill": None}
    grown, overrides = dataclasses.replace(parent, **own), ["--steps", arguments.steps, *overrides]
    run = with_overrides(
        grown,
        overrides,
        "grow",
        fixed=("model", "init", "distill"),
        own_options=command.own_options(parser),
    )
    require(
        arguments.optimizer == "fresh" or run.further == parent.further,
        "further.frozen_experts gives the optimiser another state than the parent's: add "
        "--optimizer fresh",
    )
    run_dir = arguments.run_dir or arguments.parent.with_name(f"{arguments.parent.name}_grown")
    command.use_host_devices(run.mesh.num_devices)
    require_memory(run)
    describe(run)
    require_same_tokenizer(run, str(arguments.parent), read_run_tokenizer(parent, arguments.parent))
    _, variables = load_model(parent, arguments.parent)
    names = ("operator", "factor", "warmup", "drop", "optimizer")
    settings = tuple(f"--{name} {getattr(arguments, name)}" for name in names)
    origin = parent_origin(arguments.parent, variables, run, settings)
    if not has_checkpoint(run_dir):
        describe_initial(origin)
    options = {"warmup_steps": arguments.warmup, "drop": arguments.drop, "seed": run.seed}
    variables = grow(variables, parent.model, *how, **options)
    opt_state = None
    if arguments.optimizer == "grown":
        opt_state = load_grown_optimizer_state(parent, arguments.parent, *how)
    result = fit(
        run,
        run_dir,
        variables=variables,
        opt_state=opt_state,
        initial=origin,
        sample=sampler(run, run_dir),
    )
    return finish(run, run_dir, result)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
