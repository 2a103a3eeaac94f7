"""What a plan says in words follows from its numbers."""

import dataclasses

import pytest

from configs.accelerators import H100
from planning.advice import advice
from planning.collectives import Collective
from planning.hlo import Array
from planning.memory import USABLE, LargeArray, Memory
from planning.plan import Part, Plan
from tests.planning.runs import moe_run

USABLE_GB = USABLE * H100.memory / 1e9


def memory(**changes) -> Memory:
    """Sizes in bytes; nothing is large."""
    base = Memory(
        arguments={"parameters": 10**9, "optimiser": 2 * 10**9},
        kept=0,
        gradients=0,
        temporaries=10**9,
        results=0,
        largest=(LargeArray(Array("f32", (1000,)), "attention"),),
    )
    return dataclasses.replace(base, **changes)


def plan(**changes) -> Plan:
    """A plan for H100s in which arithmetic in attention dominates."""
    base = Plan(
        run=moe_run(expert=2),
        step="train",
        accelerator=H100,
        memory=memory(),
        parts=(part("attention", compute=3e-3), part("router", compute=1e-3)),
        collectives=(),
        useful_flops=1e12,
        unknown={},
        rows_per_expert=0.0,
        trace_seconds=1.0,
        compile_seconds=1.0,
        cpu_seconds=2.0,
        peak_host_bytes=10**9,
    )
    return dataclasses.replace(base, **changes)


def part(name: str, compute: float, traffic: float = 0.0, network: float = 0.0) -> Part:
    return Part(
        name=name,
        flops=1.0,
        compute_seconds=compute,
        memory_seconds=traffic,
        kernel_seconds=max(compute, traffic),
        network_seconds=network,
    )


def said(plan: Plan) -> str:
    return " ".join(advice(plan))


def test_what_fits_says_how_much_is_free():
    assert f"It fits: {USABLE_GB - 4:.1f} GB" in said(plan())


def test_what_does_not_fit_says_by_how_much_and_what_is_largest():
    text = said(plan(memory=memory(temporaries=100 * 10**9)))
    assert f"does not fit: {103 - USABLE_GB:.1f} GB more" in text
    assert "working memory, 100.0 GB" in text
    assert "--accumulation" in text


def test_a_state_too_large_says_how_many_devices_it_takes():
    state = {"parameters": 100 * 10**9, "optimiser": 200 * 10**9}
    text = said(plan(memory=memory(arguments=state)))
    assert f"{300 / USABLE_GB:.1f} times the devices" in text


def test_activations_are_told_to_be_recomputed():
    text = said(plan(memory=memory(temporaries=100 * 10**9, kept=90 * 10**9)))
    assert "--execution.remat full" in text


def test_the_largest_array_is_named_with_its_part():
    largest = (LargeArray(Array("bf16", (1000, 1000)), "routed experts"),)
    text = said(plan(memory=memory(temporaries=100 * 10**9, largest=largest)))
    assert "bf16[1000,1000], 2 MB, of routed experts" in text


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((part("attention", compute=3e-3),), "Arithmetic dominates"),
        ((part("attention", compute=1e-3, traffic=5e-3),), "fused attention kernel"),
        ((part("routed experts", compute=1e-3, traffic=5e-3),), "Small row tiles"),
    ],
)
def test_the_largest_bound_is_named(parts, words):
    assert words in said(plan(parts=parts))


def test_a_slow_network_names_the_collective():
    groups = frozenset({frozenset(range(16))})
    gather = Collective("all-gather", "attention", 10**9, groups, ("data",), 10.0)
    parts = (part("attention", compute=1e-3, network=10 * gather.seconds(H100)),)
    text = said(plan(parts=parts, collectives=(gather,)))
    assert "The network dominates" in text
    assert "all-gather over data" in text


def test_without_rates_nothing_is_advised():
    assert advice(plan(accelerator=None)) == []


def test_a_kernel_that_the_program_has_is_not_asked_for():
    run = moe_run(expert=2)
    execution = dataclasses.replace(run.execution, grouped_matmul="auto")
    waiting = (part("routed experts", compute=1e-3, traffic=5e-3),)
    with_loops = plan(parts=waiting)
    with_kernel = plan(parts=waiting, run=dataclasses.replace(run, execution=execution))
    assert "grouped kernel" in said(with_loops)
    assert "grouped kernel" not in said(with_kernel)
