"""Doubles the experts of a trained run and trains on: the grown model begins as the same function.

    python -m scripts.grow runs/v31_nano --operator copy --steps 100

The new run's folder (by default the old one's name with _grown) is a run like any other. Its
optimiser
starts afresh: moments of experts that were one are not those of two.
"""

import dataclasses
from pathlib import Path
from typing import get_args

from checkpoint.run_directory import read_run
from infer.load import load_model
from model.growth import Operator, grow, grown_config
from scripts import command
from scripts.train import describe, finish
from train.loop import fit
from train.report import write_report


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("parent", type=Path, help="folder of a trained run")
    parser.add_argument("--operator", choices=get_args(Operator), default="copy")
    parser.add_argument("--steps", type=int, required=True, help="steps to train on")
    parser.add_argument("--run-dir", type=Path, help="folder of the new run")
    arguments = parser.parse_args(argv)
    parent, operator = read_run(arguments.parent), arguments.operator
    run = dataclasses.replace(
        parent,
        name=f"{parent.name}_grown",
        steps=arguments.steps,
        model=grown_config(parent.model, operator),
        distill=None,
    )
    run_dir = arguments.run_dir or arguments.parent.with_name(f"{arguments.parent.name}_grown")
    command.use_host_devices(run.mesh.num_devices)
    describe(run)
    _, variables = load_model(parent, arguments.parent)
    result = fit(run, run_dir, variables=grow(variables, parent.model, operator))
    write_report(run_dir)
    return finish(run, run_dir, result)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
