"""Trains a dense run with experts in its layers: its model, upcycled, begins as the same function
(but for --drop).

    python -m scripts.upcycle smollm2_code --experts 8 --top-k 2
    python -m scripts.upcycle smollm2_code --init.source path/to/model --every 2 --drop 0.5

RUN is a run of a dense model that begins with trained weights (init.source); all its other
settings stay. The new run's folder (runs/RUN_upcycled) is a run like any other, and the same
command resumes it.
"""

import dataclasses
from pathlib import Path

from configs.checks import require
from model.upcycle import upcycled_config
from planning.available import require_memory
from scripts import command
from scripts.arguments import finite
from scripts.named_runs import chosen_run, experiment_text
from scripts.samples import sampler
from scripts.sources import initial_weights
from scripts.train import describe, finish
from train.loop import fit


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, run=True)
    parser.add_argument("--experts", type=int, default=4, help="experts a layer becomes (4)")
    parser.add_argument("--top-k", type=int, default=2, help="experts for each token (2)")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth layer (1)")
    parser.add_argument("--drop", type=finite, default=0.0, help="share of units drawn anew (0)")
    arguments, overrides = command.split_run_arguments(parser, argv)
    require(
        not command.is_run_folder(arguments.run),
        f"{arguments.run} is the folder of a run: name the run of the dense model, or go on with "
        "an upcycled one by scripts.train",
    )
    dense = chosen_run(arguments, overrides)
    require(
        dense.init.source is not None,
        f"{dense.name} begins with random weights, and upcycling needs trained ones: name them "
        "with --init.source",
    )
    name = f"{dense.name}_upcycled"
    sizes = {"num_experts": arguments.experts, "top_k": arguments.top_k, "every": arguments.every}
    model = upcycled_config(dense.model, **sizes)
    init = dataclasses.replace(dense.init, drop=arguments.drop)
    run = dataclasses.replace(dense, name=name, model=model, init=init)
    is_default = arguments.run_dir == command.default_run_dir(arguments.run)
    run_dir = Path("runs") / name if is_default else arguments.run_dir
    command.use_host_devices(run.mesh.num_devices)
    require_memory(run)
    describe(run)
    begin = initial_weights(run, run_dir)
    result = fit(
        run,
        run_dir,
        variables=begin.take(),
        initial=begin.origin,
        experiment=experiment_text(arguments),
        sample=sampler(run, run_dir),
    )
    return finish(run, run_dir, result)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
