"""Work of one device in a step, instruction by instruction, read from the compiled program.

FLOPs are those of matrix products, two per multiply-add. Bytes are what each kernel reads and
writes, once each, as if nothing stayed in a cache: an operand of which a kernel reads a slice
counts as the slice, a result written into part of a larger array as the part.

Loops multiply what they hold. Of a conditional the branch with an all-to-all counts, because the
other is the replay of an overflow (parallel/expert.py), and otherwise the one with more FLOPs.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from planning.hlo import Array, Computation, Instruction, Module
from planning.kernels import (
    Assumed,
    is_counted,
    kernel_flops,
    kernel_name,
    kernel_traffic,
    multiplied,
)

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
}
"""Instructions without a kernel, or whose work is counted where they start."""

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = ("dynamic-update-slice", "scatter")

TripRule = Callable[[Instruction], float]
"""How often a loop runs whose length the program doesn't say."""


@dataclass(frozen=True)
class Executed:
    """An instruction and how often a step runs it."""

    module: Module
    computation: Computation
    instruction: Instruction
    times: float
    """0 in a branch that is not taken."""

    @property
    def collective(self) -> str | None:
        """Its kind, for the instruction that begins one."""
        return self.instruction.opcode if self.instruction.opcode in COLLECTIVES else None


def executed(module: Module, expected_trips: TripRule) -> list[Executed]:
    """The instructions that a step runs as kernels or collectives, in the order of the program."""
    return list(_walk(module, module.entry, 1.0, expected_trips))


def _walk(
    module: Module, computation: Computation, times: float, expected_trips: TripRule
) -> Iterator[Executed]:
    for instruction in computation.instructions.values():
        if instruction.opcode in FREE:
            continue
        inner = _inner(module, instruction, times, expected_trips)
        if inner is None:
            if not instruction.opcode.endswith(("-done", "-update")):
                yield Executed(module, computation, instruction, times)
            continue
        for name, inner_times in inner:
            yield from _walk(module, module.computations[name], inner_times, expected_trips)


def _inner(
    module: Module, instruction: Instruction, times: float, expected_trips: TripRule
) -> list[tuple[str, float]] | None:
    """Computations whose instructions run one by one, and how often; None for a kernel."""
    opcode = instruction.opcode
    if opcode == "while":
        body = instruction.callee("body")
        assert body is not None
        trips = instruction.trip_count
        if trips is None:
            trips = expected_trips(instruction) if times else 0.0
        return [(body, times * trips)]
    if opcode == "conditional":
        taken = _taken(module, instruction.branches)
        return [(name, times if name == taken else 0.0) for name in instruction.branches]
    if opcode == "call":
        name = instruction.callee("to_apply")
    elif opcode == "async-start":
        name = instruction.callee("calls")
    else:
        return None
    return [] if name is None else [(name, times)]


def _taken(module: Module, branches: Iterable[str]) -> str:
    """The branch that a step is taken to run."""

    def weight(name: str) -> tuple[bool, float]:
        inside = list(_walk(module, module.computations[name], 1.0, lambda _: 1.0))
        exchanges = any(x.collective in ("all-to-all", "ragged-all-to-all") for x in inside)
        return exchanges, sum(x.times * flops(x, Assumed(1.0, lambda *_: 1.0)) for x in inside)

    return max(branches, key=weight)


# --- FLOPs ----------------------------------------------------------------------------------------


def flops(executed: Executed, assumed: Assumed) -> float:
    """Of the matrix products in one run of an instruction, fused ones and our kernels' included."""
    if is_counted(executed.instruction):
        return kernel_flops(executed.computation, executed.instruction, assumed)
    return _flops(executed.module, executed.computation, executed.instruction)


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        contracted = instruction.dims("lhs_contracting_dims")
        return _dot_flops(instruction.arrays[0], computation, instruction, contracted)
    if instruction.opcode == "custom-call" and _is_gemm(instruction):
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = tuple(int(n) for n in re.findall(r"\d+", found[1])) if found else ()
        return _dot_flops(instruction.arrays[0], computation, instruction, contracted)
    name = instruction.callee("calls")
    if instruction.opcode != "fusion" or name is None:
        return 0.0
    inner = module.computations[name]
    return sum(_flops(module, inner, x) for x in inner.instructions.values())


def _dot_flops(
    result: Array, computation: Computation, instruction: Instruction, contracted: tuple[int, ...]
) -> float:
    left = computation.operands(instruction)[0].arrays[0]
    return 2.0 * result.size * math.prod(left.dims[i] for i in contracted)


def _is_gemm(instruction: Instruction) -> bool:
    """Whether a custom call is a matrix product of NVIDIA's library."""
    return bool(re.search(r'custom_call_target="__cublas', instruction.attributes))


def is_narrow(executed: Executed) -> bool:
    """Whether the matrix products of an instruction read 16-bit numbers or smaller."""
    products = _products(executed.module, executed.computation, executed.instruction)
    return all(operand.dtype not in ("f32", "f64") for operand in products)


def _products(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[Array]:
    """An operand of each of the matrix products in an instruction."""
    if is_counted(instruction):
        yield multiplied(computation, instruction)
    if instruction.opcode == "dot" or _is_gemm(instruction):
        yield computation.operands(instruction)[0].arrays[0]
    name = instruction.callee("calls")
    if instruction.opcode == "fusion" and name is not None:
        inner = module.computations[name]
        for x in inner.instructions.values():
            yield from _products(module, inner, x)


def unknown_calls(program: Iterable[Executed]) -> dict[str, float]:
    """Custom calls that hide their work, by kernel or target, and how often they run."""
    found: dict[str, float] = {}
    for x in program:
        target = re.search(r'custom_call_target="([^"]*)"', x.instruction.attributes)
        if x.instruction.opcode != "custom-call" or target is None:
            continue
        if not _is_gemm(x.instruction) and not is_counted(x.instruction):
            name = kernel_name(x.instruction) or target[1]
            found[name] = found.get(name, 0.0) + x.times
    return found


# --- Memory traffic -------------------------------------------------------------------------------


def traffic(executed: Executed, assumed: Assumed) -> float:
    """Bytes that one run of an instruction reads and writes; 0 for a collective."""
    instruction, computation = executed.instruction, executed.computation
    if executed.collective is not None:
        return 0.0
    if is_counted(instruction):
        return kernel_traffic(computation, instruction, assumed)
    operands, result = computation.operands(instruction), instruction.num_bytes
    if instruction.opcode == "custom-call" and _is_gemm(instruction):
        result = instruction.arrays[0].num_bytes  # behind it is working space
    if instruction.opcode in SLICES:
        return 2.0 * result
    if instruction.opcode == "copy":
        return 2.0 * operands[0].num_bytes
    if instruction.opcode in UPDATES:
        return 2.0 * _update_bytes(computation, instruction)
    if instruction.opcode == "fusion":
        return _fusion_traffic(executed.module, instruction)
    return float(result + sum(x.num_bytes for x in operands))


def _fusion_traffic(module: Module, instruction: Instruction) -> float:
    name = instruction.callee("calls")
    assert name is not None
    inner = module.computations[name]
    read = sum(_read(inner, parameter) for parameter in inner.parameters)
    root = inner.root
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    return float(read + sum(_written(inner, result) for result in results))


def _read(inner: Computation, value: Instruction) -> int:
    """Bytes of a fusion's operand that it reads."""
    total = 0
    for user in inner.users[value.name]:
        if user.opcode in SLICES and user.operands[0] == value.name:
            total += user.num_bytes
        elif user.opcode in UPDATES and user.operands[0] == value.name:
            continue  # written in place
        elif user.opcode == "bitcast":
            total += _read(inner, user)
        else:
            return value.num_bytes
    return min(total, value.num_bytes)


def _written(inner: Computation, result: Instruction) -> int:
    """Bytes of a fusion's result that it writes."""
    while result.opcode == "bitcast":
        result = inner.operands(result)[0]
    if result.opcode in UPDATES:
        return _update_bytes(inner, result)
    return result.num_bytes


def _update_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that go into a part of an array: the operand after it, or after a scatter's places."""
    place = 2 if instruction.opcode == "scatter" else 1
    return computation.operands(instruction)[place].num_bytes
