"""A plan for serving as tables in the terminal, or as JSON."""

import dataclasses
from typing import Any

from infer.hardware import Hardware
from planning.inference import Candidate, InferencePlan, kernels_of, remedies
from planning.report import Sheet, terminal_table, wide_console
from planning.units import flop, gigabytes, seconds


def print_inference_plan(plan: InferencePlan, name: str) -> None:
    """What was chosen and why, what every format of weights would take, and what can't be had."""
    console = wide_console()
    console.print(f"[bold]{title_of(plan, name)}[/bold]", highlight=False, soft_wrap=True)
    if plan.chosen is not None:
        console.print(terminal_table(_choices_sheet(plan, plan.chosen)))
    console.print(terminal_table(_formats_sheet(plan)))
    for sentence in sentences(plan):
        console.print(sentence, highlight=False, soft_wrap=True)


def title_of(plan: InferencePlan, name: str) -> str:
    wanted, sheet = plan.wanted, plan.hardware.sheet
    latency = "" if wanted.latency is None else f", {1e3 * wanted.latency:g} ms a token"
    return (
        f"{name} on {sheet.name} ({sheet.description}): {wanted.clients} client(s) of "
        f"{wanted.context:,} tokens{latency}, at most {wanted.budget:g} nats for rounding"
    )


def as_tree(plan: InferencePlan, name: str) -> dict[str, Any]:
    """The plan for programs: bytes, seconds, nats."""
    chosen = plan.chosen
    return {
        "model": name,
        "device": dataclasses.asdict(plan.hardware.sheet),
        "measured": plan.hardware.measured and dataclasses.asdict(plan.hardware.measured),
        "wanted": dataclasses.asdict(plan.wanted),
        "usable_memory": plan.usable_memory,
        "chosen": None if chosen is None else _tree_of(chosen),
        "kernels": None if chosen is None else _kernels(plan, chosen),
        "because": {} if chosen is None else {k: why for k, _, why in choices(plan, chosen)},
        "formats": [_tree_of(c) | {"unfit": plan.unfit_reason(c)} for c in plan.best],
        "would_fit": remedies(plan),
    }


def _tree_of(one: Candidate) -> dict[str, Any]:
    derived = {
        "nats": one.nats,
        "memory": one.memory,
        "tokens_per_second": one.tokens_per_second,
    }
    return dataclasses.asdict(one) | derived


def choices(plan: InferencePlan, one: Candidate) -> list[tuple[str, str, str]]:
    """What is chosen, its value, and what it rests on."""
    wanted, costs = plan.wanted, plan.costs
    read = sum(costs.weights(one.weights).read(one.rows).values())
    settled = "as was asked"
    others = [c for c in plan.best if c.weights != one.weights and plan.unfit_reason(c) is None]
    rivals = ", ".join(f"{c.weights} {_rate(c)}" for c in others)
    weights = (
        f"{_rate(one)} tokens/s at most"
        + (f" ({rivals})" if rivals else ", the only one that fits")
        + f"; rounding costs {one.nats:.4f} nats of {wanted.budget:g}"
    )
    state = (
        f"{gigabytes(one.state_bytes)} for {one.rows} row(s) of {wanted.context:,} tokens, read "
        f"beside {gigabytes(read)} of weights at each step"
    )
    rows = f"a step of {seconds(one.decode_seconds)} gives each a token"
    rows += "" if one.rows >= wanted.clients else f"; {wanted.clients - one.rows} client(s) wait"
    pages = (
        f"positions; the unused half of a text's last page is "
        f"{one.page_size / 2 / wanted.context:.1%} of its context"
        if costs.unpageable is None
        else f"no pages: {costs.unpageable}"
    )
    piece = f"tokens of prompts in a step, read in {seconds(one.piece_seconds)}"
    if wanted.latency is not None:
        piece += f": a step of {seconds(one.step_seconds)} keeps the latency"
    found = [
        ("weights", one.weights, settled if wanted.weights else weights),
        ("keys and values", one.kv, settled if wanted.kv else state),
        ("rows", f"{one.rows}", settled if wanted.rows else rows),
        ("page", f"{one.page_size}" if costs.unpageable is None else "-", pages),
        ("piece", f"{one.piece:,}", piece),
    ]
    for op, reason in _kernels(plan, one).items():
        kernel, _, why = reason.partition(": ")
        found.append((f"kernels of {op}", kernel, why or "the fastest that run here"))
    return found


def _rate(one: Candidate) -> str:
    rate = one.tokens_per_second
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _kernels(plan: InferencePlan, one: Candidate) -> dict[str, str]:
    return kernels_of(plan.hardware, one.weights, plan.costs.compute)


def _choices_sheet(plan: InferencePlan, one: Candidate) -> Sheet:
    rows = tuple(choices(plan, one))
    return Sheet("Choices", _source(plan.hardware), ("what", "chosen", "because"), rows)


def _source(hardware: Hardware) -> str:
    sheet = hardware.sheet
    if hardware.measured is None:
        return (
            f"{gigabytes(sheet.memory_bandwidth)}/s, {flop(sheet.flops_32)}/s in float32, "
            f"{flop(sheet.flops_16)}/s in bfloat16: {sheet.sources}. Times are bounds."
        )
    rates = hardware.measured.rates
    read = ", ".join(f"{name} {gigabytes(r.weight_bytes)}/s" for name, r in rates.items())
    return f"measured here on {hardware.num_cores} cores: one row meets weights of {read}"


def _formats_sheet(plan: InferencePlan) -> Sheet:
    headers = (
        *("weights", "of these", "keys, values", "rows", "memory", "a step", "tokens/s", "nats"),
        "verdict",
    )
    rows = tuple(
        (
            one.weights,
            gigabytes(one.weight_bytes),
            f"{one.kv}: {gigabytes(one.state_bytes)}",
            f"{one.rows}",
            gigabytes(one.memory),
            seconds(one.decode_seconds),
            _rate(one),
            f"{one.nats:.4f}",
            "chosen" if one is plan.chosen else plan.unfit_reason(one) or "slower",
        )
        for one in plan.best
    )
    source = (
        f"The best of each format; {gigabytes(plan.usable_memory)} of "
        f"{gigabytes(plan.hardware.sheet.memory)} may be used. Nats as measured on SmolLM2."
    )
    return Sheet("Formats of weights", source, headers, rows)


def sentences(plan: InferencePlan) -> list[str]:
    """What fills the memory, or what would fit."""
    one = plan.chosen
    if one is None:
        ways = remedies(plan)
        return [f"Nothing fits; what would: {'; '.join(ways) or 'another device'}."]
    free = plan.usable_memory - one.memory
    return [
        f"It fits: {gigabytes(one.weight_bytes)} of weights, {gigabytes(one.state_bytes)} of keys "
        f"and values, about {gigabytes(one.step_bytes)} for a step; {gigabytes(free)} stay free.",
        *plan.hardware.notes,
    ]
