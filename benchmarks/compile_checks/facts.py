"""One case through the GPU compiler: registers, memory, and the instructions that came out.

Runs in a process of its own, which a failing conversion in Triton may end, with XLA_FLAGS naming
the folder for what XLA writes on the way, and MOSAIC_GPU_DUMP_TO the same: a Mosaic kernel is a
custom call, whose PTX and launch XLA doesn't know.
"""

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from benchmarks.compile_checks.cases import Program, program
from benchmarks.compile_checks.devices import Device, compile_only, lowered

TOOLS = "nvidia/cu13/bin"
"""Of site-packages, where the `deviceless` extra puts ptxas and nvdisasm."""


@dataclass(kw_only=True)
class Facts:
    """What the kernel of a case compiled to."""

    registers: int
    """Per thread."""
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    """Per block, of all kinds."""
    threads: int
    instructions: int
    """Of the machine code."""
    matrix_products: dict[str, int] = field(default_factory=dict)
    """Tensor-core instructions of the PTX by name, which has the operands' types."""
    asynchronous_loads: int = 0
    plain_loads: int = 0
    """From global memory into registers: a few for tables, scales and positions."""
    local_accesses: int = 0
    widened_weights: list[str] = field(default_factory=list)
    """Instructions of the optimised HLO that make a float array as large as the weights."""
    temporary_bytes: int = 0
    """Memory of the whole program beside operands and results."""
    traffic: float | None = None
    """Bytes moved over the least, by traffic.py."""


def compile_case(name: str, device: Device, dump: Path) -> Facts:
    """Compiles and counts; `dump` is where XLA_FLAGS's --xla_dump_to points."""
    case = program(name, device)
    compiled = _compile(case, device)
    ptx_file, entry = _find(dump, case.kernel)
    body = _body(ptx_file.read_text(), entry)
    cubin = ptx_file.with_suffix(".cubin")
    facts = Facts(
        **_assemble(ptx_file, cubin, entry, device),
        threads=_threads(body),
        matrix_products=_matrix_products(body),
        widened_weights=_widened(compiled.as_text(), case.weight_elements),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        traffic=case.traffic,
    )
    facts.shared_bytes = max(facts.shared_bytes, _dynamic_shared_bytes(dump, entry))
    return _count_machine_code(facts, cubin, entry)


def _compile(case: Program, device: Device) -> Any:
    place = jax.sharding.SingleDeviceSharding(compile_only(device))
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.operands
    )
    return lowered(case.function, operands, device).compile()


_MOSAIC = "_mosaic_gpu_kernel"
_ENDINGS = rf"_\d+|{_MOSAIC}"


def _find(dump: Path, kernel: str) -> tuple[Path, str]:
    """The PTX that has the kernel, and its name there, to which the compilers append theirs."""
    found = [
        (path, entry)
        for path in sorted(dump.glob("*.ptx"))
        for entry in re.findall(rf"\.entry ({kernel}(?:{_ENDINGS})?)\(", path.read_text())
    ]
    if len(found) != 1:
        raise RuntimeError(f"expected one kernel {kernel!r} in {dump}, found {found}")
    return found[0]


def _body(ptx: str, entry: str) -> str:
    """The part of the PTX from the kernel to the next one."""
    body = ptx[ptx.index(f".entry {entry}(") + 1 :]
    return body.split(".entry ")[0]


def tool(name: str) -> Path:
    """Path of ptxas or nvdisasm in the environment."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        path = Path(place).parent / TOOLS / name
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} is not installed here: pip install '.[deviceless]'")


def _assemble(ptx_file: Path, cubin: Path, entry: str, device: Device) -> dict[str, int]:
    command = [
        tool("ptxas"),
        "-v",
        "-O3",
        f"-arch={device.accelerator.architecture}",
        ptx_file,
        "-o",
        cubin,
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    said = said[said.index(f"'{entry}'") :]
    stack, stores, loads = (
        int(n) for n in _search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", said)
    )
    (registers,) = _search(r"Used (\d+) registers", said)
    static = re.search(r"(\d+) bytes smem", said.split("\n\n")[0])
    return {
        "registers": int(registers),
        "spilled_bytes": stores + loads,
        "stack_bytes": stack,
        "shared_bytes": int(static[1]) if static else 0,
        "instructions": 0,
    }


def _search(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text, re.DOTALL)
    if match is None:
        raise RuntimeError(f"the assembler's report has no {pattern!r}:\n{text[:2000]}")
    return match.groups()


def _threads(body: str) -> int:
    (threads,) = _search(r"\.(?:reqntid|maxntid) (\d+)", body)
    return int(threads)


def _matrix_products(ptx: str) -> dict[str, int]:
    return dict(Counter(re.findall(r"(wgmma\.mma_async\.\S+|mma\.sync\.\S+)", ptx)))


def _dynamic_shared_bytes(dump: Path, entry: str) -> int:
    """Of each launch, by XLA's list of them or the log of Mosaic's passes, whose first has it."""
    if entry.endswith(_MOSAIC):
        pattern = r"dynamic_shared_memory_size %c(\d+)_i32"
        for path in dump.glob(f"{entry.removesuffix(_MOSAIC)}_*.mlir-passes.log"):
            with path.open() as log:  # of some 20 MB
                for line in log:
                    if match := re.search(pattern, line):
                        return int(match[1])
        raise RuntimeError(f"the logs of Mosaic's passes in {dump} have no launch of {entry}")
    text = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    return max(map(int, re.findall(rf"{entry}.*?shared_memory: (\d+)", text)), default=0)


def _count_machine_code(facts: Facts, cubin: Path, entry: str) -> Facts:
    listing = subprocess.run(
        [tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    listing = listing[listing.index(f".text.{entry}") :]
    names = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing))
    by_family = Counter[str]()
    for name, count in names.items():
        by_family[name.split(".")[0]] += count
    facts.instructions = sum(names.values()) - by_family["NOP"]
    facts.asynchronous_loads = by_family["LDGSTS"] + by_family["UTMALDG"]
    facts.plain_loads = by_family["LDG"]
    facts.local_accesses = by_family["LDL"] + by_family["STL"]
    return facts


def _widened(hlo: str, weight_elements: int) -> list[str]:
    """Names of HLO instructions with a float result as large as all weights."""
    if not weight_elements:
        return []
    found = []
    for name, shape in re.findall(r"(%[\w.\-]+) = (?:bf16|f16|f32)\[([\d,]+)\]", hlo):
        size = 1
        for dim in shape.split(","):
            size *= int(dim)
        if size >= weight_elements:
            found.append(name)
    return found
