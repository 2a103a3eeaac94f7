"""The least time of a case: its FLOPs at the device's peak, or its bytes at the memory's.

A bound, not an estimate: no program is faster, and none of these kernels has been timed here.
"""

from dataclasses import dataclass, replace

from benchmarks.compile_checks import work
from benchmarks.compile_checks.work import Work
from configs.accelerators import Accelerator
from kernels.cached_attention import cases as cached_cases
from kernels.grouped_matmul import cases as grouped_cases
from kernels.paged_attention import cases as paged_cases
from kernels.window_attention import cases as window_cases

CASES = {
    "grouped_matmul": grouped_cases.COMPILED,
    "window_attention": window_cases.COMPILED,
    "paged_attention": paged_cases.COMPILED,
    "paged_latent_attention": paged_cases.COMPILED_LATENT,
    "cached_attention": cached_cases.COMPILED,
}
Case = (
    grouped_cases.CompiledCase
    | window_cases.CompiledCase
    | paged_cases.CompiledCase
    | paged_cases.CompiledLatentCase
    | cached_cases.CompiledCase
)


@dataclass(frozen=True)
class Bound:
    """Seconds that a case takes at least."""

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)

    @property
    def limit(self) -> str:
        return "compute" if self.compute > self.memory else "memory"


def case_of(name: str) -> Case:
    """The case that a name, op/case, stands for."""
    op, case = name.split("/")
    return CASES[op][case]


def work_of(case: Case) -> Work:
    """Of the program of a case, as compile_checks/cases.py has it.

    A gradient of window_attention needs the forward pass's result, so its program has both.
    """
    if isinstance(case, grouped_cases.CompiledCase):
        return work.grouped(case)
    if isinstance(case, cached_cases.CompiledCase):
        return work.cached(case)
    if not isinstance(case, window_cases.CompiledCase):
        return work.paged(case)
    ours = work.window(case)
    if case.kernel == "forward":
        return ours
    forward = work.window(replace(case, kernel="forward"))
    return Work(ours.flops + forward.flops, ours.least_bytes + forward.least_bytes)


def peak_flops(case: Case, accelerator: Accelerator) -> float:
    """FLOP/s of the products that a case's kernel uses; 0 where the device has none."""
    if getattr(case, "fp8_rows", False):
        return accelerator.flops_8
    if getattr(case, "format", "") == "float32" or getattr(case, "dtype", "") == "float32":
        return accelerator.flops_exact
    return accelerator.flops_16


def bound(case: Case, accelerator: Accelerator) -> Bound | None:
    """None: the device lacks the products."""
    peak, of_case = peak_flops(case, accelerator), work_of(case)
    if not peak:
        return None
    return Bound(of_case.flops / peak, of_case.least_bytes / accelerator.memory_bandwidth)
