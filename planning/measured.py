"""A plan of a step beside what a GPU did: whether its bounds hold, and how far off they are."""

from typing import Any

from configs.accelerators import Accelerator
from configs.base import RunConfig
from parallel.topology import compile_only_mesh
from planning.plan import make_plan


def plan_metrics(run: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What a plan says of a training step on one device, as plain numbers.

    Raises:
      UserError: the compiler for GPUs is missing (parallel/topology.py).
    """
    plan = make_plan(run, "train", compile_only_mesh(accelerator), accelerator)
    return {
        "device": accelerator.name,
        "least_seconds": plan.hidden_seconds,
        "memory_bytes": plan.memory.total,
        "useful_flops": plan.useful_flops,
        "parts": {part.name: part.kernel_seconds for part in plan.parts},
        "unknown": plan.unknown,
    }


def compared(plan: dict[str, Any], ours: dict[str, Any], seconds: float) -> list[tuple[str, ...]]:
    """Rows of what was planned, what was measured, and measured over planned.

    Args:
      ours: "peak_bytes" and "flops" of the measured step.
    """
    pairs = {
        "seconds of a step, at least": (plan["least_seconds"], seconds, "{:.4f}"),
        "bytes at the peak": (plan["memory_bytes"], ours.get("peak_bytes"), "{:.3e}"),
        "useful FLOPs": (plan["useful_flops"], ours["flops"], "{:.4e}"),
    }
    return [
        (name, form.format(planned), form.format(found), f"{found / planned:.2f}")
        for name, (planned, found, form) in pairs.items()
        if found
    ]
