"""Runs every GPU kernel, a training step and decoding on this machine's GPU, beside their peers.

    python -m scripts.gpu_report                          all of it, in about 6 minutes
    python -m scripts.gpu_report --parts kernels --cases paged_attention window_attention/sinks
    python -m scripts.gpu_report --parts kernels --sizes  and tries other tiles and blocks
    python -m scripts.gpu_report --write                  and keeps the results in the repository

Parts: kernels (each right against its float32 reference and the same twice, then timed in rounds
beside XLA's, jax's and PyTorch's), training (a step of OLMoE's layers beside transformers' on
torch.compile), decoding (the same shape, in every format of weights), plan (what scripts.plan says
of the training step, beside what was measured). Each has its own share of the minutes and its own
process; a fault in one does not stop the next. What the folder has from before is kept where it is
not measured again. The exit code is 1 where a result was wrong.

Needs jax on a CUDA GPU with flax, optax, orbax-checkpoint, rich and matplotlib; torch and
transformers for the peers. Without a GPU nothing runs: bounds are printed.
"""

import argparse
from pathlib import Path
from typing import Any

import jax

from benchmarks.compile_checks.cases import NAMES
from benchmarks.gpu import parts, report, tables, training
from benchmarks.gpu.bounds import print_bounds
from benchmarks.gpu.environment import missing_packages
from configs.accelerators import accelerator_of
from configs.checks import UserError
from planning.measured import compared, plan_metrics
from scripts import command

ALL_PARTS = (*parts.SHARES, "plan")


def main(argv: list[str]) -> int:
    chosen = _chosen(argv)
    if set(chosen.parts) != {"plan"} and not parts.has_gpu():
        if chosen.write:
            raise UserError("--write keeps what a GPU did, and there is none that runs the kernels")
        print_bounds([name for name in NAMES if name.startswith(tuple(chosen.cases))])
        return 0
    jax.config.update("jax_platforms", "cpu")  # the GPU is for the parts' own processes
    kinds = ("ours", "peers", "sizes") if chosen.sizes else ("ours", "peers")
    found = report.measure(chosen.folder, 60 * chosen.minutes, chosen.parts, chosen.cases, kinds)
    if "plan" in chosen.parts and "ours" in found.get("training", {}):
        found["plan"] = _plan(found["training"])
        report.write(found, chosen.folder)
    is_planned = "failure" not in found.get("plan", {"failure": ""})
    report.show(found, chosen.folder, [_plan_sheet(found)] if is_planned else [])
    if chosen.write:
        print(f"kept in {report.keep(found, chosen.folder)}")
    wrong = tables.wrong_cases(found.get("kernels", {}))
    if wrong:
        print(f"WRONG, and not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


def _chosen(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=ALL_PARTS, default=list(ALL_PARTS))
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of kernels' cases")
    parser.add_argument("--sizes", action="store_true", help="try other tiles and blocks, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_report"))
    parser.add_argument("--write", action="store_true", help=f"keep results in {report.RESULTS}")
    chosen = parser.parse_args(argv)
    if not any(name.startswith(tuple(chosen.cases)) for name in NAMES):
        wanted = " or ".join(chosen.cases)
        raise UserError(f"no case begins with {wanted}: they are {', '.join(NAMES)}")
    if not 1 <= chosen.minutes < float("inf"):
        raise UserError(f"--minutes {chosen.minutes:g} must be at least 1")
    if missing := missing_packages():
        raise UserError(f"the report needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return chosen


def _plan(trained: dict[str, Any]) -> dict[str, Any]:
    """The plan of the step that was trained, or why there is none ("failure")."""
    accelerator = accelerator_of(trained["card"])
    if accelerator is None:
        return {"failure": f"no data sheet of {trained['card']} is known"}
    try:
        return plan_metrics(training.olmoe_run(), accelerator)
    except UserError as error:
        return {"failure": str(error)}


def _plan_sheet(found: dict[str, Any]) -> tables.Sheet:
    ours = found["training"]["ours"]
    seconds = ours["tokens"] / ours["tokens_per_second"]
    headers = ("what", "planned", "measured", "measured / planned")
    rows = compared(found["plan"], ours, seconds)
    return tables.Sheet("The plan of the training step", headers, rows)


if __name__ == "__main__":
    command.execute(main)
