"""A plan: memory, collectives, FLOPs and the least time of a step, from its compiled program.

Times are bounds: no kernel runs faster than its FLOPs at the device's peak, nor than its bytes at
the memory's bandwidth, and no collective faster than its links. Real kernels reach a part of that.
"""

import dataclasses
import functools
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from jax.sharding import Mesh

from configs.accelerators import Accelerator
from configs.base import RunConfig
from model.flops import decode_flops_per_token, forward_flops_per_token, training_flops_per_token
from planning.collectives import Collective, collectives
from planning.hlo import parse
from planning.kernels import Assumed, mean_keys
from planning.loops import balanced_load
from planning.memory import Memory, memory_of
from planning.parts import part_of
from planning.program import Program, Step, compile_step
from planning.work import Executed, executed, flops, is_narrow, traffic, unknown_calls


@dataclass(frozen=True)
class Part:
    """A part of the model in one step on one device."""

    name: str
    flops: float = 0.0
    bytes_moved: float = 0.0
    """Between the device and its memory."""
    bytes_sent: float = 0.0
    """To other devices."""
    compute_seconds: float = 0.0
    """At the peak rate; 0 where the device's rates are not known."""
    memory_seconds: float = 0.0
    kernel_seconds: float = 0.0
    """The sum over kernels of the larger of both."""
    network_seconds: float = 0.0

    def __add__(self, other: "Part") -> "Part":
        ours, theirs = dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:]
        return Part(self.name, *(a + b for a, b in zip(ours, theirs, strict=True)))


@dataclass(frozen=True)
class Plan:
    """What a step needs; figures are one device's."""

    run: RunConfig
    step: Step
    accelerator: Accelerator | None
    """None: host devices, whose rates are not known."""
    memory: Memory
    parts: tuple[Part, ...]
    """The longest first."""
    collectives: tuple[Collective, ...]
    useful_flops: float
    """What the mathematics asks for (model/flops.py)."""
    unknown: dict[str, float]
    """Custom calls whose work is not counted, and how often they run."""
    rows_per_expert: float
    """That were taken for what only the data decide: the balanced load."""
    trace_seconds: float
    compile_seconds: float
    cpu_seconds: float
    peak_host_bytes: int
    """Most memory that the planning process has held."""

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def kernel_seconds(self) -> float:
        return sum(part.kernel_seconds for part in self.parts)

    @property
    def network_seconds(self) -> float:
        return sum(part.network_seconds for part in self.parts)

    @property
    def hidden_seconds(self) -> float:
        """Least time of a step if the network is hidden behind the kernels, or they behind it."""
        return max(self.kernel_seconds, self.network_seconds)

    @property
    def exposed_seconds(self) -> float:
        """Least time of a step if nothing overlaps."""
        return self.kernel_seconds + self.network_seconds

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.run.batch_size if self.step == "decode" else self.run.tokens_per_step

    def mfu(self, seconds: float) -> float:
        """Useful FLOPs over the peak's in that time (PaLM, 2022, appendix B)."""
        assert self.accelerator is not None
        return self.useful_flops / (seconds * self.accelerator.flops_16)


def make_plan(run: RunConfig, step: Step, mesh: Mesh, accelerator: Accelerator | None) -> Plan:
    """Compiles the step for the mesh and reads what it needs.

    Raises:
      UserError: see planning/program.py.
    """
    return read_plan(compile_step(run, step, mesh), accelerator)


def read_plan(program: Program, accelerator: Accelerator | None) -> Plan:
    """What a compiled step needs."""
    run, step, mesh = program.run, program.step, program.mesh
    module = parse(program.compiled.as_text())
    load = balanced_load(run, program.num_tokens)
    instructions = executed(module, lambda _: load.trips)
    found = collectives(instructions, mesh)
    assumed = Assumed(load.rows, functools.partial(mean_keys, run.model))
    return Plan(
        run=run,
        step=step,
        accelerator=accelerator,
        memory=memory_of(program, module, instructions),
        parts=_parts(instructions, found, assumed, accelerator),
        collectives=tuple(found),
        useful_flops=useful_flops(run, step) / mesh.size,
        unknown=unknown_calls(instructions),
        rows_per_expert=load.rows,
        trace_seconds=program.trace_seconds,
        compile_seconds=program.compile_seconds,
        cpu_seconds=program.cpu_seconds,
        peak_host_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def useful_flops(run: RunConfig, step: Step) -> float:
    """Of a step on all devices."""
    length = run.data.seq_len
    if step == "train":
        return run.tokens_per_step * training_flops_per_token(run.model, length)
    if step == "prefill":
        return run.tokens_per_step * forward_flops_per_token(run.model, length)
    if step == "decode":
        return run.batch_size * decode_flops_per_token(run.model, length)
    assert_never(step)


def _parts(
    instructions: Iterable[Executed],
    found: Iterable[Collective],
    assumed: Assumed,
    accelerator: Accelerator | None,
) -> tuple[Part, ...]:
    pieces = [_kernel(x, assumed, accelerator) for x in instructions]
    pieces += [_exchange(x, accelerator) for x in found]
    sums: dict[str, Part] = {}
    for piece in pieces:
        sums[piece.name] = piece + sums[piece.name] if piece.name in sums else piece
    used = [part for part in sums.values() if part.flops or part.bytes_moved or part.bytes_sent]
    return tuple(sorted(used, key=lambda p: (-p.kernel_seconds - p.network_seconds, -p.flops)))


def _kernel(x: Executed, assumed: Assumed, accelerator: Accelerator | None) -> Part:
    """All runs of one instruction in a step."""
    work, moved = x.times * flops(x, assumed), x.times * traffic(x, assumed)
    compute = memory = 0.0
    if accelerator is not None:
        compute = work / (accelerator.flops_16 if is_narrow(x) else accelerator.flops_32)
        memory = moved / accelerator.memory_bandwidth
    return Part(
        name=part_of(x),
        flops=work,
        bytes_moved=moved,
        compute_seconds=compute,
        memory_seconds=memory,
        kernel_seconds=max(compute, memory),
    )


def _exchange(x: Collective, accelerator: Accelerator | None) -> Part:
    """All runs of one collective in a step."""
    time = 0.0 if accelerator is None else x.times * x.seconds(accelerator)
    return Part(name=x.part, bytes_sent=x.times * x.bytes_sent, network_seconds=time)
