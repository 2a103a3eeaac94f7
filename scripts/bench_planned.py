"""Measures what planning for this machine gives over defaults, on eight shapes of requests.

    python -m scripts.bench_planned smollm2
    python -m scripts.bench_planned runs/v31_nano --rounds 5 --json planned.json

The defaults are scripts.serve's (float32, 8 rows), the other arm what moesaic plan-inference says.
Run it with nothing beside it: what shares the machine moves the figures.
"""

import dataclasses
import functools
import json
from pathlib import Path

from rich.console import Console

from benchmarks import machine
from benchmarks.planned import SHAPES, compare, geometric_mean, table_of
from configs.checks import require
from infer.sources import open_source
from scripts import command
from scripts.inference_plans import HERE, found_hardware, planned_for
from train.progress import ProgressBar


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    parser.add_argument("--rounds", type=int, default=3, help="of both arms on each shape (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all that was measured")
    arguments = parser.parse_args(argv)
    require(arguments.rounds > 0, f"--rounds {arguments.rounds} must be at least 1")
    source = open_source(arguments.source)
    shapes = [shape for shape in SHAPES if shape.length <= source.config.context_length]
    require(bool(shapes), f"{source.name} has no context for the shortest of the shapes")
    command.keep_compiled()
    hardware = found_hardware(HERE)
    print(machine.description())
    with ProgressBar("shapes", total=len(shapes), unit="shapes") as bar:
        plan_for = functools.partial(planned_for, source, hardware)
        found = compare(source, plan_for, shapes, arguments.rounds, bar.update)
    Console().print(table_of(found))
    if arguments.json is not None:
        tree = [dataclasses.asdict(one) | {"ratio": one.ratio} for one in found]
        whole = {"machine": machine.description(), "shapes": tree, "mean": geometric_mean(found)}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    command.execute(main)
