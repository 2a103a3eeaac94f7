"""Device memory of a compiled step, and whether it fits.

Sizes of what goes in come from shapes and shardings; everything else from XLA's buffer assignment
(`Compiled.memory_analysis`), which is what the program will allocate.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from model.transformer import is_scanned
from planning.hlo import Array, Computation, Instruction, Module
from planning.parts import part_of
from planning.program import Program
from planning.work import Executed

USABLE = 0.9
"""Share of a device's memory that a step may fill: XLA_PYTHON_CLIENT_MEM_FRACTION=.90. JAX sets
aside 0.75 by default (jax docs, "GPU memory allocation"); CUDA, NCCL and fragmentation need the
rest.
"""


@dataclass(frozen=True)
class LargeArray:
    """One of the largest results in the program."""

    array: Array
    part: str
    """Of the model; see planning/parts.py."""

    @property
    def num_bytes(self) -> int:
        return self.array.num_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: dict[str, int]
    """By what they are."""
    kept: int
    """Of the temporaries: what the forward pass's loop over layers keeps for the backward pass."""
    gradients: int
    """Of the temporaries: gradients that the backward pass's loop stacks up."""
    temporaries: int
    """All of them at their peak: kept, gradients, and what layers need while they run."""
    results: int
    """What comes out and does not take the place of an argument."""
    largest: tuple[LargeArray, ...]

    @property
    def total(self) -> int:
        return sum(self.arguments.values()) + self.temporaries + self.results

    @property
    def working(self) -> int:
        """Temporaries beside kept and gradients."""
        return self.temporaries - self.kept - self.gradients

    def excess(self, device_memory: int) -> float:
        """Bytes by which the step exceeds what it may fill; negative is room to spare."""
        return self.total - USABLE * device_memory


def memory_of(program: Program, module: Module, executed: Iterable[Executed]) -> Memory:
    """As the compiler assigned it."""
    analysis = program.compiled.memory_analysis()
    model, kept, gradients = program.run.model, 0, 0
    if is_scanned(model):
        kept, gradients = _stacks(module, model.num_periods)
    if kept + gradients > analysis.temp_size_in_bytes:
        kept = gradients = 0  # some of them share buffers: don't tell them apart
    return Memory(
        arguments=program.arguments,
        kept=kept,
        gradients=gradients,
        temporaries=analysis.temp_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        largest=_largest(executed),
    )


def _stacks(module: Module, num_periods: int) -> tuple[int, int]:
    """Bytes that loops over the layers' periods stack up, forward and backward."""
    kept = gradients = 0
    for computation in module.computations.values():
        for loop in computation.instructions.values():
            is_scan = loop.opcode == "while" and loop.trip_count == num_periods
            if not is_scan or "/moe/" in loop.op_name:  # a loop over experts
                continue
            for written in _stacked(module, loop, num_periods):
                if "transpose(" in written.op_name:
                    gradients += written.num_bytes
                else:
                    kept += written.num_bytes
    return kept, gradients


def _stacked(module: Module, loop: Instruction, length: int) -> list[Instruction]:
    """The arrays of a loop's state to which each turn adds its own entry."""
    name = loop.callee("body")
    assert name is not None
    body = module.computations[name]
    if body.root.opcode != "tuple":
        return []
    return [
        x
        for x in body.operands(body.root)
        if len(x.arrays) == 1 and x.arrays[0].dims[:1] == (length,) and _is_update(module, body, x)
    ]


def _is_update(module: Module, computation: Computation, x: Instruction) -> bool:
    """Whether it writes a part of an array, alone or at the end of a fusion."""
    while x.opcode in ("bitcast", "copy"):
        x = computation.operands(x)[0]
    callee = x.callee("calls") if x.opcode == "fusion" else None
    if callee is not None:
        inner = module.computations[callee]
        return _is_update(module, inner, inner.root)
    return x.opcode == "dynamic-update-slice"


def _largest(executed: Iterable[Executed], count: int = 6) -> tuple[LargeArray, ...]:
    """The largest results, each shape once."""
    first: dict[Array, Executed] = {}
    for x in executed:
        for array in x.instruction.arrays:
            first.setdefault(array, x)
    largest = sorted(first, key=lambda array: -array.num_bytes)[:count]
    return tuple(LargeArray(array, part_of(first[array])) for array in largest)
