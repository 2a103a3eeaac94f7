"""Bounds and compile results of the kernels' cases, shown where there is no GPU."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from benchmarks.compile_checks import run
from benchmarks.gpu.roofline import Bound, bound, case_of, work_of
from configs.accelerators import A100, H100


def print_bounds(names: Iterable[str]) -> None:
    """One row for each case."""
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
