"""The GPU report as tables: kernels, training, decoding; and what `auto` reads of it.

A table is its headers and rows of words, which Markdown and HTML show alike.
"""

import html
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.gpu.checks import is_right
from benchmarks.gpu.programs import OURS, kind_of

Report = dict[str, Any]


class Sheet(NamedTuple):
    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sheets(report: Report) -> list[Sheet]:
    """All tables for which the report has figures: of a part that failed there may be none."""
    makers = {
        "kernels": (kernel_sheet, "cases"),
        "training": (training_sheet, "ours"),
        "decoding": (decoding_sheet, "ours"),
    }
    return [
        make(report[part])
        for part, (make, figures) in makers.items()
        if report.get(part, {}).get(figures)
    ]


def median(entry: dict[str, Any], program: str = OURS) -> float | None:
    """Seconds of a call; None: not timed."""
    seconds = entry.get("seconds", {}).get(program)
    return statistics.median(seconds) if seconds else None


def wrong_cases(kernels: dict[str, Any]) -> list[str]:
    """Cases whose own result was wrong, or not the same twice."""
    found = []
    for name, entry in kernels.get("cases", {}).items():
        check = entry["checks"].get(OURS)
        if check is not None and not is_right(check):
            found.append(name)
    return found


# --- Kernels -------------------------------------------------------------------------------------


def kernel_sheet(kernels: dict[str, Any]) -> Sheet:
    """One row for each case: right, how fast, how near to the card's ceiling, the best peer."""
    ceiling = kernels["ceilings"]
    headers = ("case", "error", "us", "TFLOP/s", "GB/s", "of the ceiling", "best peer", "ratio")
    rows = [_kernel_row(name, entry, ceiling) for name, entry in sorted(kernels["cases"].items())]
    shown = f"copy {ceiling['bytes_per_second'] / 1e12:.2f} TB/s"
    shown += f", product {ceiling['flops_per_second'] / 1e12:.0f} TFLOP/s"
    return Sheet(f"Kernels ({shown})", headers, rows)


def _kernel_row(name: str, entry: dict[str, Any], ceiling: dict[str, float]) -> tuple[str, ...]:
    check, ours = entry["checks"].get(OURS), median(entry)
    if check is None:
        reason = next(iter(entry["failures"].values()), "not run")
        return (name, f"not run: {reason[:60]}", *[""] * 6)
    error = f"{check['error']:.1e}" if is_right(check) else f"WRONG: {check['error']:.1e}"
    if ours is None:
        return (name, error, *[""] * 6)
    share = max(
        entry["flops"] / ceiling["flops_per_second"],
        entry["least_bytes"] / ceiling["bytes_per_second"],
    )
    rates = (f"{entry['flops'] / ours / 1e12:.0f}", f"{entry['least_bytes'] / ours / 1e9:,.0f}")
    peer = best_peer(entry)
    beside = ("", "") if peer is None else (peer[0], f"{peer[1] / ours:.2f}")
    return (name, error, f"{ours * 1e6:,.0f}", *rates, f"{share / ours:.2f}", *beside)


def best_peer(entry: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest peer that does the case's whole work, and its seconds."""
    times = {
        label: statistics.median(seconds)
        for label, seconds in entry.get("seconds", {}).items()
        if kind_of(label) == "peers" and label != "one dense product"
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def measured(kernels: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds of cases that both compilers have, by op: what kernels/measured.json holds."""
    cases, found = kernels["cases"], {}
    for name, entry in sorted(cases.items()):
        op, case = name.split("/")
        if not case.startswith("mosaic_") or op not in ("grouped_matmul", "window_attention"):
            continue
        plain = case.removeprefix("mosaic_")
        pair = {"mosaic": median(entry), "triton": median(cases.get(f"{op}/{plain}", {}))}
        if None in pair.values():
            continue
        key = f"{op}/{format_of(plain)}" if op == "grouped_matmul" else op
        of_case = {compiler: round(1e6 * seconds, 1) for compiler, seconds in pair.items()}  # type: ignore[operator]
        found.setdefault(key, {})[plain] = of_case
    return found


def format_of(case: str) -> str:
    """The weights' format of a case of grouped_matmul, by its name."""
    first = case.split("_")[0]
    return {"fp8": "fp8_e4m3", "int8": "int8", "int4": "int4"}.get(first, "bf16")


# --- Models --------------------------------------------------------------------------------------


def training_sheet(training: dict[str, Any]) -> Sheet:
    """Ours, and the peer with masters in float32 and without."""
    headers = ("program", "tokens/s", "TFLOP/s", "MFU at 989 TFLOP/s", "peak GB", "ours is faster")
    ours, peer = training["ours"], training.get("peer", {})
    title = f"A training step of {ours['layers']} layers of OLMoE's, {ours['tokens']:,} tokens"
    rows = [_training_row("ours, masters in float32", ours, ours)]
    if "balanced" in training:
        rows.append(_training_row("ours, experts dealt in turn", training["balanced"], ours))
    for masters in ("float32", "bfloat16"):
        if masters in peer:
            rows.append(_training_row(f"transformers, masters in {masters}", peer[masters], ours))
    if "failure" in peer:
        rows.append(("transformers", peer["failure"][:80], *[""] * 4))
    if "small" in training:
        apart = largest_difference(training["small"])
        rows.append((f"a small model's losses: within {apart:.1e} of a CPU's", *[""] * 5))
    return Sheet(title, headers, rows)


def largest_difference(small: dict[str, list[float]]) -> float:
    """The most that a step's loss here differs from a CPU's, in parts of it."""
    pairs = zip(small["here"], small["cpu"], strict=True)
    return max(abs(here - there) / there for here, there in pairs)


def _training_row(name: str, found: dict[str, Any], ours: dict[str, Any]) -> tuple[str, ...]:
    rate = found["tokens_per_second"]
    flops = ours["flops"] / ours["tokens"] * rate
    peak = f"{found['peak_bytes'] / 1e9:.1f}" if found.get("peak_bytes") else ""
    ratio = ours["tokens_per_second"] / rate
    mfu = f"{flops / PEAK_FLOPS:.1%}"
    return (name, f"{rate:,.0f}", f"{flops / 1e12:.0f}", mfu, peak, f"{ratio:.2f}")


PEAK_FLOPS = 989.4e12
"""Of an H100 or H200 (SXM) in dense bfloat16, by the data sheet."""


def decoding_sheet(decoding: dict[str, Any]) -> Sheet:
    """One row for each format and batch, beside the peer's of the same batch; the engine's last."""
    headers = ("weights", "batch", "tokens/s", "ms a step", "GB/s", "peer tokens/s", "ratio")
    peers = {found["batch"]: found for found in decoding.get("peer", {}).get("decoding", [])}
    rows = []
    for found in (*decoding["ours"], *decoding.get("engine", [])):
        step, rate = statistics.median(found["seconds_per_step"]), found["tokens_per_second"]
        is_engine = "gigabytes_per_second" not in found
        name = f"{found['weights']}, by the engine" if is_engine else found["weights"]
        moved = "" if is_engine else f"{found['gigabytes_per_second']:,.0f}"
        beside, peer = ("", ""), peers.get(found["batch"])
        if peer is not None:
            theirs = peer["tokens_per_second"]
            beside = (f"{theirs:,.0f} ({peer['how'][:30]})", f"{rate / theirs:.2f}")
        rows.append(
            (name, str(found["batch"]), f"{rate:,.0f}", f"{step * 1e3:.2f}", moved, *beside)
        )
    first = decoding["ours"][0]
    title = f"Decoding, {first['layers']} layers of OLMoE's after {first['context']} tokens"
    return Sheet(title, headers, rows)


# --- As text -------------------------------------------------------------------------------------


def markdown(sheet: Sheet) -> str:
    lines = [sheet.headers, ("---",) * len(sheet.headers), *sheet.rows]
    table = "\n".join(f"| {' | '.join(_flat(cell) for cell in line)} |" for line in lines)
    return f"## {sheet.title}\n\n{table}\n"


def _flat(cell: str) -> str:
    return cell.replace("|", "/").replace("\n", " ")


def as_html(sheet: Sheet) -> str:
    def row(cells: Iterable[str], kind: str) -> str:
        inside = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(row(cells, "td") for cells in sheet.rows)
    return f"<h2>{html.escape(sheet.title)}</h2><table>{row(sheet.headers, 'th')}{body}</table>"
