"""A plan as tables in the terminal and as one HTML page with pictures."""

import dataclasses
import html
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from planning.advice import advice
from planning.collectives import grouped
from planning.memory import USABLE
from planning.pictures import draw_memory, draw_parts
from planning.plan import Plan
from planning.search import Found
from planning.units import amount, flop, gigabytes, seconds
from train.report import Picture, write_page

LEAST_WIDTH = 110
"""Columns of the terminal's tables."""


@dataclass(frozen=True)
class Sheet:
    """A table with a title and a sentence on where its figures come from."""

    title: str
    source: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_plan(plan: Plan) -> None:
    console = wide_console()
    console.print(f"[bold]{title_of(plan)}[/bold]", highlight=False, soft_wrap=True)
    for sheet in sheets(plan):
        console.print(terminal_table(sheet))
    for sentence in sentences(plan):
        console.print(sentence, highlight=False, soft_wrap=True)


def print_found(found: list[Found]) -> None:
    """The candidates of a search, those that fit first, the faster before the slower."""
    wide_console().print(terminal_table(search_sheet(found)))


def wide_console() -> Console:
    """Wide enough for the tables also where nothing tells the width."""
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    return console


def write_plan(plan: Plan, directory: Path) -> Path:
    """Writes report.html and its pictures; returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = [draw_memory(plan)]
    if plan.accelerator is not None:
        pictures.append(draw_parts(plan))
    return _page(directory, title_of(plan), sentences(plan), sheets(plan), pictures, plan)


def _page(
    directory: Path,
    title: str,
    lines: list[str],
    tables: list[Sheet],
    pictures: list[Picture],
    plan: Plan,
) -> Path:
    sections = ["".join(f"<p>{html.escape(line)}</p>" for line in lines)]
    sections += [_html_table(sheet) for sheet in tables]
    settings = json.loads(json.dumps(dataclasses.asdict(plan.run)))
    return write_page(directory, title, sections, pictures, settings)


def title_of(plan: Plan) -> str:
    run, mesh = plan.run, plan.run.mesh
    device = plan.accelerator.name if plan.accelerator else "host device"
    rows = run.batch_size // (mesh.data * mesh.expert)
    return (
        f"{run.name}, {plan.step} step on {mesh.num_devices} x {device}: mesh data={mesh.data} "
        f"expert={mesh.expert} tensor={mesh.tensor}, {rows} row(s) of {run.data.seq_len:,} tokens "
        f"per data and expert shard, remat {run.execution.remat}, {run.execution.transport}"
    )


def sentences(plan: Plan) -> list[str]:
    """What the step takes at least, what dominates, what to change, and what was left out."""
    found = []
    if plan.accelerator is not None:
        found += [_time_sentence(plan), *advice(plan)]
    if plan.rows_per_expert:
        found.append(
            f"Estimated, not read: every expert gets {plan.rows_per_expert:,.4g} rows at a time, "
            "the balanced load (planning/loops.py)."
        )
    if plan.unknown:
        names = ", ".join(f"{name} ({times:g} times)" for name, times in plan.unknown.items())
        found.append(f"Custom calls whose FLOPs the program doesn't tell are not counted: {names}.")
    found.append(
        f"Planned in {plan.trace_seconds + plan.compile_seconds:.0f} s (tracing "
        f"{plan.trace_seconds:.0f}, compiling {plan.compile_seconds:.0f}; "
        f"{plan.cpu_seconds:.0f} s of CPU) with "
        f"{plan.peak_host_bytes / 1e9:.2f} GB of memory."
    )
    return found


def _time_sentence(plan: Plan) -> str:
    hidden, exposed = plan.hidden_seconds, plan.exposed_seconds
    return (
        f"A step takes at least {seconds(hidden)} if the network hides behind the kernels and "
        f"{seconds(exposed)} if nothing overlaps: at most {plan.tokens / hidden:,.0f} or "
        f"{plan.tokens / exposed:,.0f} tokens per second, an MFU of at most "
        f"{plan.mfu(hidden):.1%} or {plan.mfu(exposed):.1%}. Bounds, not predictions."
    )


def sheets(plan: Plan) -> list[Sheet]:
    made = [_memory_sheet(plan), _parts_sheet(plan)]
    return [*made, _collectives_sheet(plan)] if plan.collectives else made


def _memory_sheet(plan: Plan) -> Sheet:
    memory, shardings, compiler = plan.memory, "shapes and shardings", "XLA's buffers"
    rows = [(name, gigabytes(size), shardings) for name, size in memory.arguments.items()]
    if memory.kept or memory.gradients:
        stacks = "arrays that the loop over layers stacks"
        rows.append(("kept for the backward pass", gigabytes(memory.kept), stacks))
        rows.append(("gradients of the layers", gigabytes(memory.gradients), stacks))
        rows.append(("working memory", gigabytes(memory.working), f"{compiler}, the rest"))
    else:
        rows.append(("activations and temporaries", gigabytes(memory.temporaries), compiler))
    rows.append(("results", gigabytes(memory.results), compiler))
    rows.append(("total", gigabytes(memory.total), ""))
    if plan.accelerator is not None:
        usable = f"usable, {USABLE:.0%} of {plan.accelerator.memory / 1e9:.1f} GB"
        excess = memory.excess(plan.accelerator.memory)
        verdict = "does not fit: too much by" if excess > 0 else "fits: free"
        rows.append((usable, gigabytes(USABLE * plan.accelerator.memory), "data sheet"))
        rows.append((verdict, gigabytes(abs(excess)), ""))
    source = "GB are powers of ten. Temporaries are counted at their peak."
    return Sheet("Memory of one device", source, ("what", "size", "source"), tuple(rows))


def _parts_sheet(plan: Plan) -> Sheet:
    rates = plan.accelerator
    headers = ("part", "FLOPs", "memory traffic", "sent")
    if rates is not None:
        headers += ("compute", "memory", "kernels", "network")
    rows = []
    for part in plan.parts:
        row = (part.name, flop(part.flops), amount(part.bytes_moved), amount(part.bytes_sent))
        if rates is not None:
            times = (
                part.compute_seconds,
                part.memory_seconds,
                part.kernel_seconds,
                part.network_seconds,
            )
            row += tuple(map(seconds, times))
        rows.append(row)
    source = "FLOPs and bytes are read from the compiled program; parts from XLA's names."
    if rates is not None:
        source += (
            f" Least times at {rates.flops_16 / 1e12:.0f} TFLOP/s (bfloat16; float32 products "
            f"{rates.flops_32 / 1e12:.0f}), {rates.memory_bandwidth / 1e12:.2f} TB/s of memory, "
            f"{rates.node_bandwidth / 1e9:.0f} GB/s in a node of {rates.devices_per_node} and "
            f"{rates.network_bandwidth / 1e9:.0f} GB/s per device between nodes ({rates.sources}). "
            "kernels: the larger of compute and memory, kernel by kernel."
        )
    return Sheet("One step of one device, by part", source, headers, tuple(rows))


def _collectives_sheet(plan: Plan) -> Sheet:
    headers = ("collective", "over", "devices", "times", "input", "sent per step")
    if plan.accelerator is not None:
        headers += ("least time",)
    rows = []
    for (kind, axes), members in grouped(plan.collectives).items():
        times = sum(c.times for c in members)
        row = (
            kind,
            " ".join(axes) or "other",
            str(members[0].group_size),
            f"{times:,.0f}",
            amount(sum(c.times * c.payload for c in members)),
            amount(sum(c.times * c.bytes_sent for c in members)),
        )
        if plan.accelerator is not None:
            row += (seconds(sum(c.times * c.seconds(plan.accelerator) for c in members)),)
        rows.append(row)
    source = (
        "Read from the compiled program, loops multiplied. Sent: by one device, as the ring "
        "algorithms do it (nccl-tests, doc/PERFORMANCE.md); latency is left out."
    )
    return Sheet("Collectives of one step", source, headers, tuple(rows))


def search_sheet(found: list[Found]) -> Sheet:
    estimated = ("mesh", "remat", "memory estimated", "compiled", "fits", "step estimated")
    headers = (*estimated, "at least, hidden", "exposed", "MFU at most")
    rows = []
    for x in found:
        mesh, plan = x.candidate.run.mesh, x.plan
        assert plan.accelerator is not None
        excess = plan.memory.excess(plan.accelerator.memory)
        rows.append(
            (
                f"data={mesh.data} expert={mesh.expert} tensor={mesh.tensor}",
                x.candidate.run.execution.remat,
                gigabytes(x.candidate.estimate.memory),
                gigabytes(plan.memory.total),
                "yes" if excess <= 0 else f"no, by {gigabytes(excess)}",
                seconds(x.candidate.estimate.seconds),
                seconds(plan.hidden_seconds),
                seconds(plan.exposed_seconds),
                f"{plan.mfu(plan.hidden_seconds):.1%}",
            )
        )
    source = "Estimated by formulas (planning/estimate.py); the rest from compiled programs."
    return Sheet("Best by estimate", source, headers, tuple(rows))


def terminal_table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", caption=sheet.source)
    table.caption_justify = "left"
    for i, header in enumerate(sheet.headers):
        is_text = i == 0 or header in ("source", "over", "remat", "fits", "because", "verdict")
        table.add_column(header, justify="left" if is_text else "right", no_wrap=i == 0)
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _html_table(sheet: Sheet) -> str:
    def cells(row: tuple[str, ...], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        return f"<tr>{inside}</tr>"

    body = cells(sheet.headers, "th") + "".join(cells(row, "td") for row in sheet.rows)
    return (
        f"<h2>{html.escape(sheet.title)}</h2>"
        f'<div style="overflow-x: auto"><table>{body}</table></div>'
        f"<p><small>{html.escape(sheet.source)}</small></p>"
    )
