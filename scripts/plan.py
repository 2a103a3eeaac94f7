"""Plans a step of a run on a GPU cluster: memory, collectives, FLOPs and least times, from the
program compiled for it on this machine, which needs no GPU.

    python -m scripts.plan deepseek_v3 --device h100 --mesh data=16,expert=32
    python -m scripts.plan mixtral_8x7b --device a100 --mesh data=8 --step decode
    python -m scripts.plan v31 --device h100 --mesh data=8,expert=8 --search 3

Tables go to the terminal, a page with pictures into the run's folder. Other arguments override the
run's settings. GPUs need XLA's compiler for them: `make plan ARGS="v31 --device h100"` runs this in
an environment of its own that has it. --device cpu compiles for host devices, anywhere.
"""

import argparse
import dataclasses

import jax

from configs.accelerators import ACCELERATORS
from configs.base import RunConfig
from configs.checks import require
from parallel.mesh import make_mesh
from parallel.topology import MAX_DEVICES, compile_only_mesh
from planning.plan import Plan, make_plan
from planning.report import print_found, print_plan, write_plan
from planning.request import planned_run
from planning.search import search
from scripts import command
from scripts.named_runs import with_source_model


def main(argv: list[str]) -> None:
    arguments, overrides = command.split_run_arguments(_parser(), argv)
    asked = planned_run(arguments.run, arguments.mesh, overrides, arguments.own_options)
    run = with_source_model(asked)
    require(
        run.mesh.num_devices <= MAX_DEVICES,
        f"the mesh has {run.mesh.num_devices:,} devices, at most {MAX_DEVICES:,} are planned for",
    )
    plan = _plan(arguments, run)
    mesh = plan.run.mesh
    name = f"{plan.step}_{arguments.device}_{mesh.data}x{mesh.expert}x{mesh.tensor}"
    print_plan(plan)
    print(f"page: {write_plan(plan, arguments.run_dir / 'plans' / name)}")


def _plan(arguments: argparse.Namespace, run: RunConfig) -> Plan:
    accelerator, sizes = ACCELERATORS.get(arguments.device), dataclasses.asdict(run.mesh)
    if accelerator is None:
        require(not arguments.search, "--search ranks by a GPU's rates: give --device h100 or a100")
        command.use_host_devices(run.mesh.num_devices)
        return make_plan(run, arguments.step, make_mesh(**sizes), None)
    jax.config.update("jax_platforms", "cpu")  # compile for GPUs, use none
    if not arguments.search:
        mesh = compile_only_mesh(accelerator, **sizes)
        return make_plan(run, arguments.step, mesh, accelerator)
    require(arguments.step == "train", f"--search is for training, got --step {arguments.step}")
    require(arguments.search > 0, f"--search {arguments.search} must be at least 1")
    found = search(run, accelerator, arguments.search)
    print_found(found)
    return found[0].plan


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__, run=True)
    parser.add_argument("--device", choices=[*ACCELERATORS, "cpu"], default="h100")
    parser.add_argument("--mesh", metavar="data=D,expert=E,tensor=T", help="default: the run's")
    parser.add_argument("--step", choices=["train", "prefill", "decode"], default="train")
    parser.add_argument(
        "--search", type=int, nargs="?", const=3, help="compile the best few meshes (3)"
    )
    return parser


if __name__ == "__main__":
    command.execute(main)
