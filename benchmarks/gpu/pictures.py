"""Pictures of the GPU report: how near each kernel comes to the card's ceilings, and its peer."""

from typing import Any

from benchmarks.gpu.tables import best_peer, median
from train.report import BLUE, ORANGE, Picture, new_figure, to_picture


def draw_kernels(kernels: dict[str, Any]) -> Picture | None:
    """A bar for each timed case, and a mark for its best peer; None: nothing was timed."""
    shares = []
    for name, entry in kernels["cases"].items():
        ours = median(entry)
        if ours is None:
            continue
        least = _least_seconds(entry, kernels["ceilings"])
        peer = best_peer(entry)
        shares.append((least / ours, name, None if peer is None else least / peer[1]))
    if not shares:
        return None
    shares.sort()
    figure, axes = new_figure(8.0, 1.0 + 0.19 * len(shares))
    places = range(len(shares))
    axes.barh(places, [share for share, _, _ in shares], color=BLUE, height=0.7, label="ours")
    marked = [(theirs, i) for i, (_, _, theirs) in enumerate(shares) if theirs is not None]
    if marked:
        x, y = zip(*marked, strict=True)
        axes.scatter(
            x, y, marker="|", s=60, color=ORANGE, linewidths=2.5, label="best peer", zorder=3
        )
    axes.set_yticks(places, [name for _, name, _ in shares], fontsize=7)
    axes.set_ylim(-0.7, len(shares) - 0.3)
    axes.set_xlabel("share of the measured ceiling, of arithmetic or memory")
    axes.legend(loc="lower right", frameon=False)
    caption = (
        "Each kernel's least time, by the rates of a large product and a large copy, over what it "
        "took. Operands that fit into the L2 cache may come to more than 1."
    )
    return to_picture(figure, "kernels", caption)


def _least_seconds(entry: dict[str, Any], ceilings: dict[str, float]) -> float:
    compute = entry["flops"] / ceilings["flops_per_second"]
    return max(compute, entry["least_bytes"] / ceilings["bytes_per_second"])
