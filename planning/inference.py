"""How to serve a model on a device: formats, kernels, pages, rows and pieces of prompts.

All combinations are counted (planning/inference_cost.py); of those within the memory, the latency
and the budget for rounding, the one with the most tokens per second is taken. What decides does not
depend on the memory, so more memory never gives a worse plan.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import jax.numpy as jnp

from configs.accelerators import DATA_SHEETS
from configs.checks import UserError, require
from formats.gguf.blocks import BLOCK
from infer.engine.options import EngineOptions
from infer.hardware import Hardware
from kernels import backend, native
from kernels.grouped_matmul.implementations import runs_native
from kernels.quantize.formats import AFFINE, QUANTIZED, WeightFormat, default_block_size
from planning.inference_cost import Costs, formats_on
from planning.memory import USABLE

NATS: dict[str, float] = {
    "float32": 0.0,
    "bfloat16": 0.0004,
    "int8": 0.0015,
    "fp8": 0.0185,
    "int4_affine": 0.2,
    "int4": 0.2052,
}
"""What rounding weights costs a token: measured on SmolLM2 (docs/experiments.md, "What rounding
weights costs": the larger of prose and code); "int4_affine" as "int4", which it is no better than
where weights were never rounded. Of another model it is an estimate."""
FOUND_AGAIN = 0.0031
"""What "int4_affine" costs where the file has its layers in four bits (the same table)."""
KV_NATS: dict[str, float] = {"float32": 0.0, "bfloat16": 0.0004, "int8": 0.0010}
"""The same of keys and values: 2,555 tokens each of docs/experiments.md and of the engine's code in
windows of 511, by the engine's log-probabilities of prompts (a script that was not kept); the
larger of the two, in size."""
BUDGET = 0.01
"""Nats that rounding may cost, where nobody says."""
PAGES = (64, 32, 16)
LARGEST_PIECE, SMALLEST_PIECE = 4096, 16
PIECE = EngineOptions.piece


@dataclass(frozen=True)
class Wanted:
    """What is asked of serving, and what is settled before."""

    context: int
    clients: int = 8
    latency: float | None = None
    """Seconds between two tokens of a client, at most, while another's prompt is read."""
    budget: float = BUDGET
    weights: WeightFormat | None = None
    kv: str | None = None
    rows: int | None = None
    is_in_four_bits: bool = False
    """Whether the model's layers are so in its file."""

    def __post_init__(self) -> None:
        require(self.context >= 2, f"context={self.context} must be at least 2 tokens")
        require(self.clients >= 1, f"clients={self.clients} must be at least 1")
        require(
            self.latency is None or self.latency > 0,
            f"latency={self.latency} must be greater than 0",
        )
        require(self.budget >= 0, f"quality budget {self.budget} must not be negative")
        require(self.rows is None or self.rows >= 1, f"rows={self.rows} must be at least 1")


@dataclass(frozen=True)
class Candidate:
    """One way to serve, and what it takes."""

    weights: WeightFormat
    weight_nats: float
    """What rounding them costs a token."""
    kv: str
    rows: int
    page_size: int
    piece: int
    weight_bytes: float
    state_bytes: float
    step_bytes: float
    decode_seconds: float
    piece_seconds: float

    @property
    def nats(self) -> float:
        return self.weight_nats + KV_NATS[self.kv]

    @property
    def memory(self) -> float:
        return self.weight_bytes + self.state_bytes + self.step_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.decode_seconds

    @property
    def step_seconds(self) -> float:
        """A step in which a prompt is read, too."""
        return self.decode_seconds + self.piece_seconds

    @property
    def rank(self) -> tuple[Any, ...]:
        """The largest is the best: of equal speed what is rounded least, and takes least."""
        return (self.tokens_per_second, -self.nats, -self.memory, self.piece)


@dataclass(frozen=True)
class InferencePlan:
    """What was chosen, beside the best of each format of weights."""

    wanted: Wanted
    costs: Costs
    chosen: Candidate | None
    """None: nothing fits."""
    best: tuple[Candidate, ...]
    """Of each format: the best that fits, else the one that comes nearest to it."""

    @property
    def hardware(self) -> Hardware:
        return self.costs.hardware

    @property
    def usable_memory(self) -> float:
        return USABLE * self.hardware.sheet.memory

    def require_chosen(self) -> Candidate:
        """
        Raises:
          UserError: nothing fits.
        """
        if self.chosen is None:
            raise UserError(f"nothing fits; what would: {'; '.join(remedies(self))}")
        return self.chosen

    def unfit_reason(self, one: Candidate) -> str | None:
        """Why it can't be taken; None: it can."""
        return unfit_reason(one, self.wanted, self.usable_memory)


def make_inference_plan(costs: Costs, wanted: Wanted) -> InferencePlan:
    """
    Raises:
      UserError: a format that the device's kernels, or the model's layers, don't have.
    """
    memory = USABLE * costs.hardware.sheet.memory
    found = candidates(costs, wanted)
    fitting = [c for c in found if unfit_reason(c, wanted, memory) is None]
    best = []
    for format in dict.fromkeys(c.weights for c in found):
        own = [c for c in found if c.weights == format]
        held = [c for c in own if c.memory <= memory]
        quick = [c for c in held if wanted.latency is None or c.step_seconds <= wanted.latency]
        near = [c for c in quick if c.nats <= wanted.budget] or quick
        if near:
            best.append(max(near, key=_rank))
        else:
            best.append(min(held, key=_step) if held else min(own, key=_memory))
    chosen = max(fitting, key=_rank) if fitting else None
    return InferencePlan(wanted, costs, chosen, tuple(best))


def _rank(one: Candidate) -> tuple[Any, ...]:
    return one.rank


def _memory(one: Candidate) -> float:
    return one.memory


def _step(one: Candidate) -> float:
    return one.step_seconds


def unfit_reason(one: Candidate, wanted: Wanted, memory: float) -> str | None:
    """Why it can't be taken; None: it can."""
    if one.memory > memory:
        return f"{(one.memory - memory) / 1e9:,.2f} GB too much"
    if one.nats > wanted.budget:
        return f"rounding costs {one.nats:.4f} nats of {wanted.budget:g}"
    if wanted.latency is not None and one.step_seconds > wanted.latency:
        return f"a step takes {1e3 * one.step_seconds:.3g} ms of {1e3 * wanted.latency:g}"
    return None


def candidates(costs: Costs, wanted: Wanted) -> list[Candidate]:
    """All ways that are counted.

    Raises:
      UserError: a format that is settled and that there is not.
    """
    formats = formats_on(costs.hardware)
    require(
        wanted.weights in (None, *formats),
        f"no kernel of {costs.hardware.sheet.name} reads weights in {wanted.weights}: take one of "
        f"{', '.join(formats)}",
    )
    page_size = choose_page_size(wanted.context)
    kinds = [wanted.kv] if wanted.kv else [k for k in KV_NATS if _may_hold(k, costs)]
    rows = [wanted.rows] if wanted.rows else _rows_up_to(wanted.clients)
    states = {
        (kv, count): costs.state_bytes(kv, count, page_size) for kv, count in product(kinds, rows)
    }
    kinds = [kv for kv in kinds if states[kv, rows[0]] is not None]
    require(bool(kinds), f"this model can't keep its state in {wanted.kv}: leave kv out")
    weights = (wanted.weights,) if wanted.weights else formats
    made = []
    for format, kv, count in product(weights, kinds, rows):
        size = states[kv, count]
        assert size is not None
        made.append(_candidate(costs, wanted, format, kv, count, page_size, size))
    return made


def _may_hold(kv: str, costs: Costs) -> bool:
    """Whether keys and values are not wider than what is computed."""
    return kv != "float32" or costs.compute == "float32"


def _rows_up_to(clients: int) -> list[int]:
    """Powers of two below the clients, and all of them at once."""
    return sorted({*(1 << i for i in range(clients.bit_length())), clients} - {0})[:32]


def _candidate(
    costs: Costs,
    wanted: Wanted,
    format: WeightFormat,
    kv: str,
    rows: int,
    page_size: int,
    state_bytes: float,
) -> Candidate:
    decode = costs.decode_seconds(format, rows, state_bytes)
    piece = choose_piece(costs, wanted, format, decode)
    is_found_again = wanted.is_in_four_bits and _keeps_blocks(format, costs.hardware)
    return Candidate(
        weights=format,
        weight_nats=FOUND_AGAIN if is_found_again else NATS[format],
        kv=kv,
        rows=rows,
        page_size=page_size,
        piece=piece,
        weight_bytes=costs.weights(format).total,
        state_bytes=state_bytes,
        step_bytes=costs.step_bytes(rows, piece),
        decode_seconds=decode,
        piece_seconds=costs.prompt_seconds(format, piece),
    )


def _keeps_blocks(format: WeightFormat, hardware: Hardware) -> bool:
    """Whether blocks with offsets are as small on the device as in a GGUF file: larger ones hold
    several grids, which none of theirs is."""
    if format not in AFFINE or hardware.target is None:
        return False
    return default_block_size(QUANTIZED[format], hardware.target) <= BLOCK


def choose_page_size(context: int) -> int:
    """The largest page whose unused half is at most a sixteenth of the context."""
    return next((size for size in PAGES if size / 2 <= context / 16), PAGES[-1])


def choose_piece(costs: Costs, wanted: Wanted, format: WeightFormat, decode: float) -> int:
    """Tokens of prompts that a step reads. With a latency the most that keep it; without, so many
    that the products take as long as reading the weights, PIECE at least. The context at most."""
    most = max(SMALLEST_PIECE, min(LARGEST_PIECE, 1 << (wanted.context - 1).bit_length()))
    sizes = [1 << i for i in range(SMALLEST_PIECE.bit_length() - 1, most.bit_length())]
    if wanted.latency is not None:
        left = wanted.latency - decode
        kept = [size for size in sizes if costs.prompt_seconds(format, size) <= left]
        return kept[-1] if kept else sizes[0]
    knee = next((size for size in sizes if costs.is_bound_by_products(format, size)), sizes[-1])
    return min(max(knee, PIECE), sizes[-1])


# --- Kernels -------------------------------------------------------------------------------------


def kernels_of(hardware: Hardware, weights: WeightFormat, compute: str) -> dict[str, str]:
    """What "auto" takes on the device, by operation, with the reason."""
    target = hardware.target
    if target is None:
        plain = "XLA's own: nothing is known of the device"
        return {"products": plain, "attention": plain}
    if target.platform == "cpu":
        if not runs_native(target):
            plain = "XLA's own: the native kernels are not built, or this process has a GPU"
            return {"products": plain, "attention": plain}
        ours = f"native C++ ({native.isa()})"
        return {"products": ours, "attention": ours}
    if not backend.runs_triton(target):
        plain = f"XLA's own: Triton needs compute capability {backend.OLDEST_CUDA / 10}"
        return {"products": plain, "attention": plain}
    op = f"grouped_matmul/{QUANTIZED[weights]}" if weights in QUANTIZED else "grouped_matmul/bf16"
    return {
        "products": _compiler(op, target, compute),
        "attention": _compiler("window_attention", target, compute),
    }


def _compiler(op: str, target: backend.Target, compute: str) -> str:
    """Mosaic's kernel or Triton's, by what was measured (kernels/measured.json)."""
    if not backend.runs_mosaic(target):
        return "Triton: Mosaic's kernels are Hopper's"
    if jnp.dtype(compute) != jnp.bfloat16:
        return f"Triton: Mosaic's kernels multiply bfloat16, and this model computes in {compute}"
    cases = backend.measured().get(str(target.capability), {}).get(op, {})
    if not cases:
        return f"Triton: {op} was not measured"
    mean = 1.0
    for case in cases.values():
        mean *= (case["mosaic"] / case["triton"]) ** (1 / len(cases))
    name = "Mosaic" if backend.prefers_mosaic(op, target) else "Triton"
    return f"{name}: Mosaic takes {mean:.2f} of Triton's time, measured in {len(cases)} cases"


# --- What would do -------------------------------------------------------------------------------


def remedies(plan: InferencePlan) -> list[str]:
    """What would make it fit, each a clause; empty where something fits."""
    if plan.chosen is not None:
        return []
    wanted, costs, usable = plan.wanted, plan.costs, plan.usable_memory
    found = candidates(costs, wanted)
    clauses = []
    rest = [c for c in found if c.memory <= usable]
    slow = [c for c in rest if c.nats <= wanted.budget]
    if slow:
        fastest = min(c.step_seconds for c in slow)
        clauses.append(f"a latency of {1e3 * fastest:.3g} ms (the least of these)")
    quick = [c for c in rest if wanted.latency is None or c.step_seconds <= wanted.latency]
    if quick and not slow:
        least = min(quick, key=lambda c: c.nats)
        clauses.append(f"a quality budget of {least.nats:.4f} nats ({least.weights})")
    least = min((c for c in found if c.nats <= wanted.budget), key=_memory, default=None)
    if least is None or rest:
        return clauses
    context = _largest_context(plan, least)
    if context:
        clauses.append(f"a context of {context:,} tokens")
    holding = [n for n, s in DATA_SHEETS.items() if USABLE * s.memory >= least.memory]
    holding = [n for n in holding if n not in ("unknown", "cpu", plan.hardware.sheet.name)]
    if holding:
        clauses.append(f"one {' or '.join(holding)}")
    count = -(-least.memory // usable)
    clauses.append(f"at least {count:,.0f} devices of this kind (--mesh.expert, --mesh.tensor)")
    return clauses


def _largest_context(plan: InferencePlan, least: Candidate) -> int:
    """Tokens for which the state of one row would still fit beside the weights; 0: none."""
    left = plan.usable_memory - least.weight_bytes - least.step_bytes
    of_token = least.state_bytes / least.rows / plan.wanted.context
    tokens = int(left / of_token) if left > 0 and of_token else 0
    return tokens // least.page_size * least.page_size
