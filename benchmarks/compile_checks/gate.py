"""Limits that a compiled case is held to, and by how much it may get worse."""

import hashlib
from dataclasses import asdict
from typing import Any

import jax

from benchmarks.compile_checks.cases import Program, program
from benchmarks.compile_checks.devices import Device
from benchmarks.compile_checks.facts import Facts

REGISTERS_OF_A_CORE = 65_536
SLACK = {"registers": 1.1, "instructions": 1.1, "shared_bytes": 1.0, "plain_loads": 1.0}
"""Times what the committed results say; more is a regression."""


def program_hash(name: str, device: Device) -> str:
    """Of the case as jax traces it: shapes, tiles and every operation, but not how it is written.

    Traces of two versions of jax differ.
    """
    case = program(name, device)
    traced = str(jax.make_jaxpr(case.function)(*case.operands))
    return hashlib.sha256(traced.encode()).hexdigest()[:16]


def faults(name: str, device: Device, facts: Facts) -> list[str]:
    """What is wrong with a case by itself, in sentences."""
    case = program(name, device)
    found = []
    is_allowed = 0 < facts.spilled_bytes <= case.most_spilled
    if (facts.spilled_bytes or facts.stack_bytes or facts.local_accesses) and not is_allowed:
        found.append(
            f"spills: {facts.spilled_bytes} bytes, stack {facts.stack_bytes} bytes, "
            f"{facts.local_accesses} accesses to local memory"
        )
    if facts.shared_bytes > device.accelerator.shared_bytes:
        found.append(
            f"{facts.shared_bytes} bytes of shared memory, over {device.accelerator.shared_bytes}"
        )
    if facts.registers * facts.threads > REGISTERS_OF_A_CORE:
        found.append(f"{facts.registers} registers in {facts.threads} threads: none can start")
    if case.has_tensor_cores:
        found += _wrong_products(facts, expected_product(device, case))
        if not facts.asynchronous_loads:
            found.append("no asynchronous load: operands wait in registers for shared memory")
        if facts.plain_loads > case.plain_loads:
            found.append(f"{facts.plain_loads} plain loads, over {case.plain_loads}")
    if facts.widened_weights:
        found.append(f"weights are widened in memory by {', '.join(facts.widened_weights)}")
    if facts.traffic is not None and facts.traffic > case.most_traffic:
        found.append(f"{facts.traffic:.2f} times the least bytes, over {case.most_traffic}")
    return found


def expected_product(device: Device, case: Program) -> tuple[str, str]:
    """How the name of every tensor-core instruction must begin and end."""
    if device.target.capability >= 90 and case.rows_of_dot >= 64:
        operands = ".e4m3.e4m3" if case.has_fp8_products else ".bf16.bf16"
        return "wgmma.mma_async.sync.aligned.m64", f".f32{operands}"
    return "mma.sync.aligned.m16n8k16.row.col.f32.bf16", ".bf16.f32"


def _wrong_products(facts: Facts, expected: tuple[str, str]) -> list[str]:
    begin, end = expected
    wrong = [
        name
        for name in facts.matrix_products
        if not (name.startswith(begin) and name.rstrip(";").endswith(end))
    ]
    if wrong or not facts.matrix_products:
        return [f"tensor-core instructions {wrong or 'missing'}, not {begin}...{end}"]
    return []


def regressions(facts: Facts, committed: dict[str, Any]) -> list[str]:
    """What is worse than the committed results by more than the slack."""
    found, ours = [], asdict(facts)
    for what, slack in SLACK.items():
        before, now = committed[what], ours[what]
        if now > before * slack:
            found.append(f"{what}: {now}, was {before}")
    if set(ours["matrix_products"]) != set(committed["matrix_products"]):
        found.append(f"tensor-core instructions changed: {sorted(ours['matrix_products'])}")
    return found
