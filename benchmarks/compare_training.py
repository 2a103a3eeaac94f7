"""The tables of scripts/bench_train.py."""

from rich.console import Console
from rich.table import Table

from benchmarks.alternate import Series, ratios
from benchmarks.time_by_part import profile
from benchmarks.training import ComputeDtype, lowered_step, make_step, mixtral_run

PEER_EXPERTS = ("grouped_mm", "eager")
"""Experts implementations of transformers that run on CPU; the faster one is the peer."""


def print_comparison(series: dict[str, Series], dtype: ComputeDtype) -> None:
    """A row per program, then `ratio: X`, ours over the faster peer in tokens per second.

    Args:
      series: "moesaic" first, then the peers.
      dtype: what both computed in.
    """
    tokens = mixtral_run().tokens_per_step
    table = Table("program", "tokens/s", "least", "most", "ms/step", "first step s", "peak MB")
    for name, s in series.items():
        table.add_row(
            name,
            f"{tokens / s.median:,.0f}",
            f"{tokens / max(s.seconds):,.0f}",
            f"{tokens / min(s.seconds):,.0f}",
            f"{s.median * 1e3:.0f}",
            f"{s.first_seconds:.1f}",
            f"{s.peak_mb:.0f}",
        )
    Console().print(table)
    ours, *peers = series
    best = min(peers, key=lambda name: series[name].median)
    middle, least, most = ratios(series[best], series[ours])
    rounds = len(series[ours].seconds)
    kind = "bfloat16 autocast" if dtype == "bfloat16" else "float32"
    print(f"peer: transformers with {best}, {kind}, fused AdamW; {rounds} alternating rounds")
    print(f"ratio: {middle:.2f} (from {least:.2f} to {most:.2f} round by round)")
    print(f"memory ratio: {series[ours].peak_mb / series[best].peak_mb:.2f}")


def print_profile(steps: int, dtype: ComputeDtype) -> None:
    """Where a step of ours spends its thread-seconds, over `steps` steps."""
    run = mixtral_run(dtype)
    step = make_step(run)
    step()
    parts = profile(lambda: [step() for _ in range(steps)], lowered_step(run))
    total = parts.pop("total")
    table = Table("part", "thread ms per step", "share")
    for part, seconds in parts.items():
        table.add_row(part, f"{seconds / steps * 1e3:.1f}", f"{seconds / total:.0%}")
    table.add_row("all", f"{total / steps * 1e3:.1f}", "100%")
    Console().print(table)
