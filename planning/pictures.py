"""Pictures of a plan: what fills a device's memory, and the least time of each part of a step."""

import numpy as np
from matplotlib.axes import Axes

from planning.memory import USABLE
from planning.plan import Plan
from planning.units import gigabytes, seconds
from train.report import BLUE, INK, ORANGE, SOFT, Picture, new_figure, to_picture

SHARES = {
    "parameters": "#1f4e79",
    "optimiser": "#2f6f9f",
    "cache": "#5b9bc8",
    "inputs and routers": "#a9c9e2",
    "gradients": "#8a5a19",
    "kept for the backward pass": "#d9822b",
    "working memory": "#f0c48a",
    "results": "#9aa5b1",
}
"""Colours: blue for what goes in, brown for what a step makes."""


def draw_memory(plan: Plan) -> Picture:
    """One bar of shares, against the device's memory."""
    memory = plan.memory
    sizes = {
        **memory.arguments,
        "gradients": memory.gradients,
        "kept for the backward pass": memory.kept,
        "working memory": memory.working,
        "results": memory.results,
    }
    figure, axes = new_figure(7.5, 2.4)
    begin = 0.0
    for name, color in SHARES.items():
        size = sizes.get(name, 0) / 1e9
        if size > 0:
            label = f"{name}, {gigabytes(sizes[name])}"
            axes.barh([0], [size], left=begin, color=color, height=0.5, label=label)
            begin += size
    if plan.accelerator is not None:
        _mark(axes, USABLE * plan.accelerator.memory / 1e9)
        begin = max(begin, plan.accelerator.memory / 1e9)
    axes.set_xlim(0, 1.03 * begin)
    axes.set_ylim(-0.4, 0.55)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("GB on one device")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2, frameon=False, fontsize=9)
    caption = "Memory of one device; the line is what a step may fill of it."
    return to_picture(figure, "memory", caption)


def _mark(axes: Axes, usable: float) -> None:
    axes.axvline(usable, color=INK, linewidth=1.4)
    axes.annotate(
        f"usable {usable:.0f} GB",
        (usable, 0.5),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
    )


def draw_parts(plan: Plan) -> Picture:
    """Least times of arithmetic, memory traffic and network for each part."""
    parts = plan.parts[::-1]
    figure, axes = new_figure(7.5, 1.2 + 0.55 * len(parts))
    places = np.arange(len(parts))
    kinds = {
        "arithmetic": (BLUE, [p.compute_seconds for p in parts]),
        "memory": (SOFT, [p.memory_seconds for p in parts]),
        "network": (ORANGE, [p.network_seconds for p in parts]),
    }
    longest = max(max(values) for _, values in kinds.values())
    for i, (name, (color, values)) in enumerate(kinds.items()):
        heights = places + 0.26 * (1 - i)
        axes.barh(heights, np.array(values) * 1e3, height=0.24, color=color, label=name)
        for place, value in zip(heights, values, strict=True):
            if value > 0.01 * longest:
                axes.text(value * 1e3, place, f" {seconds(value)}", va="center", fontsize=8)
    axes.set_yticks(places, [part.name for part in parts])
    axes.set_xlim(0, 1.15e3 * longest)
    axes.set_xlabel("least time in a step, ms")
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="lower right")
    caption = "Least time of each part at the device's peak rates; real kernels take longer."
    return to_picture(figure, "parts", caption)
