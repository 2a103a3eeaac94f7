"""XLA's optimised program, parsed from its text: computations, and the instructions in them.

The text is what `Compiled.as_text()` gives: scheduled, partitioned (shapes are one device's), and
fused. Read is what planning needs: shapes, operands, called computations, trip counts, names.
"""

import functools
import math
import re
from dataclasses import dataclass

BITS = {"pred": 8, "token": 0, "opaque": 0}
"""Of the types whose name doesn't end in its bits, as f32, s4 and f8e4m3fn (see _bits) do."""


@dataclass(frozen=True)
class Array:
    """A type and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return -(-self.size * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    """Of an asynchronous operation without its "-start"; where it ends, with its "-done"."""
    arrays: tuple[Array, ...]
    """The result, tuples flattened."""
    operands: tuple[str, ...]
    """Names of instructions in the same computation."""
    attributes: str
    """Everything after the operands, as it stands."""
    is_root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """Where in our code it comes from: "jit(step)/.../layer_0/attention/..."; may be empty."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    def callee(self, attribute: str) -> str | None:
        """The computation that an attribute such as "calls" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def dims(self, attribute: str) -> tuple[int, ...]:
        """Of an attribute such as lhs_contracting_dims={0,1}; empty where it is missing."""
        found = re.search(rf"\b{attribute}={{([\d,]*)}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional: of 0, 1, ..., or of false and true."""
        found = re.search(r"branch_computations={([^}]*)}", self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        pair = (self.callee("false_computation"), self.callee("true_computation"))
        return tuple(name for name in pair if name is not None)

    @property
    def trip_count(self) -> int | None:
        """How often a while loop runs, where the compiler knows it."""
        found = re.search(r'"known_trip_count":{"n":"(\d+)"}', self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True, eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction's result."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the caller's operands."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.attributes.partition(")")[0]))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclass(frozen=True, eq=False)
class Module:
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """
    Raises:
      ValueError: text without an entry computation, or an instruction that can't be read.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if header:
                current = Computation(header[2], {})
                computations[current.name] = current
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif line.strip():
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is no HLO module")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    found = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        raise ValueError(f"no instruction of HLO: {line.strip()[:200]!r}")
    shape, rest = _split_shape(found[3])
    opcode, _, rest = rest.partition("(")
    inside, attributes = _split_parenthesis(rest)
    if opcode == "parameter":  # its number stands where others have operands
        attributes = f"{inside}){attributes}"
    return Instruction(
        name=found[2],
        opcode=_base(opcode.strip()),
        arrays=_arrays(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=attributes,
        is_root=bool(found[1]),
    )


def _base(opcode: str) -> str:
    return opcode if opcode == "async-start" else opcode.removesuffix("-start")


def _split_shape(text: str) -> tuple[str, str]:
    """The result's shape, which is one word or a tuple in parentheses, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = _split_parenthesis(text[1:])
    return inside, rest.lstrip()


def _split_parenthesis(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what follows it."""
    depth = 1
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return text[: place.start()], text[place.end() :]
    raise ValueError(f"a parenthesis of HLO doesn't close: {text[:200]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in found
    )


def _bits(dtype: str) -> int:
    """Bits of one entry: f32 32, bf16 16, s4 4, f8e4m3fn 8, c64 64."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)
    if not found:
        raise ValueError(f"unknown type of HLO: {dtype!r}")
    return int(found[1])
