"""Times the GPU kernels' cases against XLA, jax's own kernels and tokamax, in alternating rounds.

    python -m scripts.bench_kernels                        every case
    python -m scripts.bench_kernels paged_attention        the cases whose name begins so
    python -m scripts.bench_kernels --write                and keeps the figures in runs/gpu_kernels

Each case's result is first compared with its float32 reference on the device; a wrong one is not
timed, and the exit code is 1. Times are medians over the rounds. A ratio above 1 is ours being
faster, with the least and the greatest. The share is of the bound: the least time by the data
sheet's FLOP/s or bytes per second.

Without a GPU nothing runs: what is printed are the bounds on an H100 and an A100, and what the
compiler made of the kernels (kernels/compiled.json).
"""

import dataclasses
import json
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.measure import Timing, device_for, measure
from benchmarks.gpu.roofline import Bound, bound, case_of, work_of
from configs.checks import UserError
from kernels.backend import Target, current_target, runs_triton
from kernels.compile_checks import run
from kernels.compile_checks.cases import NAMES, runs_on
from parallel.topology import A100, H100, accelerator_of
from scripts import command

RESULTS = Path("runs/gpu_kernels")


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("prefix", nargs="?", default="", help="beginning of the names of the cases")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS}")
    arguments = parser.parse_args(argv)
    names = [name for name in NAMES if name.startswith(arguments.prefix)]
    if not names:
        raise UserError(f"no case begins with {arguments.prefix!r}: they are {', '.join(NAMES)}")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds} must be at least 1")
    target = current_target()
    if target.platform in ("cuda", "rocm") and runs_triton(target):
        return _measure_all(names, target, arguments.rounds, arguments.write)
    if arguments.write:
        raise UserError("--write keeps what a GPU did, and there is none that runs the kernels")
    print_bounds(names)
    return 0


# --- On a GPU ------------------------------------------------------------------------------------


def _measure_all(names: list[str], target: Target, rounds: int, is_written: bool) -> int:
    kind = jax.devices()[0].device_kind
    accelerator = accelerator_of(kind)
    print(f"{kind}; " + (accelerator.sources if accelerator else "no data sheet: no bounds"))
    timings = []
    for name in names:
        if runs_on(name, device_for(target)):
            timings.append(measure(name, target, accelerator, rounds))
            print_timing(timings[-1])
    if is_written:
        print(f"kept in {keep(kind, timings)}")
    wrong = [timing.name for timing in timings if not timing.is_right]
    if wrong:
        print(f"WRONG, and not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


def print_timing(timing: Timing) -> None:
    """One table for each case: they come seconds apart."""
    limit = "" if timing.bound is None else f", bound by {timing.bound.limit}"
    table = Table("program", "ms", "TFLOP/s", "GB/s", "share", "ours is faster", "least", "most")
    table.title = f"{timing.name}: error {timing.error:.1e}{limit}"
    for program in timing.seconds:
        share, ratios = timing.share(program), timing.ratio(program)
        table.add_row(
            program,
            f"{timing.median(program) * 1e3:.3f}",
            f"{timing.teraflops(program):.1f}",
            f"{timing.gigabytes(program):.0f}",
            "" if share is None else f"{share:.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    Console().print(table)
    for program, reason in timing.failures.items():
        print(f"  {program} did not run: {reason}")


def keep(kind: str, timings: list[Timing]) -> Path:
    """Writes the figures, with the device and the versions, and returns where."""
    path = RESULTS / f"{kind.replace(' ', '_').lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = {timing.name: dataclasses.asdict(timing) for timing in timings}
    content = {"device": kind, "jax": jax.__version__, "cases": cases}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


# --- Without one ---------------------------------------------------------------------------------


def print_bounds(names: list[str]) -> None:
    """What can be said without a GPU, one row for each case."""
    print("No GPU that runs the kernels: nothing was run, and no speed is claimed.")
    print("Bounds: the least time by the data sheets of an H100 and an A100 (SXM, 80 GB).")
    print("Then registers, shared memory and instructions of sm_90a / sm_80, as compiled.")
    headers = ("case", "GFLOP", "MB", "H100", "A100", "registers", "shared", "instructions")
    table = Table(*headers)
    committed = run.read_committed()["cases"]
    for name in names:
        case = case_of(name)
        of_case, bounds = work_of(case), [bound(case, device) for device in (H100, A100)]
        facts = [committed.get(f"{name}/{architecture}") for architecture in ("sm_90a", "sm_80")]
        compiled = [
            " / ".join("-" if entry is None else str(entry[what]) for entry in facts)
            for what in ("registers", "shared_bytes", "instructions")
        ]
        figures = (f"{of_case.flops / 1e9:.1f}", f"{of_case.least_bytes / 1e6:.1f}")
        table.add_row(name, *figures, *map(_shown, bounds), *compiled)
    Console(width=180, soft_wrap=True).print(table)


def _shown(bound: Bound | None) -> str:
    return "-" if bound is None else f"{bound.seconds * 1e6:.0f} us, {bound.limit}"


if __name__ == "__main__":
    command.execute(main)
