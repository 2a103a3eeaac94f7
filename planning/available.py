"""Memory that there is: of the host, within its control groups' limits, or of an accelerator.

Linux tells it in /proc/meminfo and /sys/fs/cgroup (kernel documentation, "The /proc Filesystem" and
"Control Group v2"); where there is neither, it is not known.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from configs.architecture import ModelConfig
from configs.base import ExecutionConfig, RunConfig
from configs.checks import UserError
from infer.hardware import from_sheet
from infer.weights import WeightFormat
from planning.estimate import MemoryEstimate, estimate_memory, weights_of
from planning.inference_cost import Costs

KIB, GB = 1024, 1e9


def require_memory(
    run: RunConfig, *teachers: ModelConfig, weights: WeightFormat = "float32"
) -> None:
    """Compares what training needs, by formulas, with the memory there is; allocates nothing.

    Args:
      teachers: models whose weights lie beside, split over the same devices.
      weights: the format of their weights.
    Raises:
      UserError: it is more.
    """
    needed = _of_step(run)
    beside = teacher_bytes(teachers, weights) + logits_bytes(run, teachers)
    needed = dataclasses.replace(needed, state=needed.state + beside / run.mesh.num_devices)
    device = jax.local_devices()[0]
    on_host = device.platform == "cpu"
    have = available_memory() if on_host else (device.memory_stats() or {}).get("bytes_limit")
    # Devices of a host share its memory.
    devices = run.mesh.num_devices // jax.process_count() if on_host else 1
    if have is None or devices * needed.total <= have:
        return
    where = "this machine has" if on_host else f"each device of {run.mesh.num_devices} has"
    raise UserError(
        f"training {run.name} needs about {devices * needed.total / GB:,.1f} GB "
        f"({devices * needed.state / GB:,.1f} for weights, gradients and optimiser, the rest "
        f"for a step's activations), and {where} {have / GB:,.1f} GB to give: choose a smaller "
        "run, batch_size or data.seq_len, or a larger machine (scripts.plan says what a run needs)"
    )


def distillation_memory(
    run: RunConfig, teachers: Sequence[ModelConfig], weights: WeightFormat
) -> str:
    """What a step of distillation takes on all devices together, by formulas, in a sentence."""
    step = run.mesh.num_devices * _of_step(run).total
    held, logits = teacher_bytes(teachers, weights), logits_bytes(run, teachers)
    whose = "the teacher's" if len(teachers) == 1 else f"{len(teachers)} teachers'"
    return (
        f"memory of a step, about {(step + held + logits) / GB:,.2f} GB: {step / GB:,.2f} for the "
        f"student's own, {held / GB:,.2f} for {whose} weights in {weights}, {logits / GB:,.2f} for "
        "a chunk of their logits"
    )


@functools.lru_cache(maxsize=1)  # both are asked about one run, whose model is traced for it
def _of_step(run: RunConfig) -> MemoryEstimate:
    return estimate_memory(run, weights_of(run))


def teacher_bytes(teachers: Sequence[ModelConfig], weights: WeightFormat) -> float:
    """Of the teachers' weights in a format, scales included."""
    hardware = from_sheet("cpu" if jax.default_backend() == "cpu" else "h100")
    costs = [Costs(teacher, ExecutionConfig(), hardware, 1) for teacher in teachers]
    return sum(cost.weights(weights).total for cost in costs)


def logits_bytes(run: RunConfig, teachers: Sequence[ModelConfig]) -> float:
    """Of a chunk of the teachers' logits in float32."""
    tokens = run.tokens_per_step / run.accumulation / run.execution.logits_chunks
    return sum(4 * tokens * teacher.vocab_size for teacher in teachers)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a new program on this host may use before the system ends it; None if unknown.

    Args:
      root: where /proc and /sys lie.
    """
    amounts = [_of_host(root / "proc/meminfo"), *_of_groups(root)]
    return min((amount for amount in amounts if amount is not None), default=None)


def _of_host(path: Path) -> int | None:
    """Memory to be had without pushing anybody out, and the free swap."""
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text().splitlines())
    amounts = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    if "MemAvailable" not in amounts:
        return None
    return KIB * (amounts["MemAvailable"] + amounts.get("SwapFree", 0))


def _of_groups(root: Path) -> list[int]:
    """Bytes below the limit of this process's control group and of each one above it."""
    mounted, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.exists() else []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    folder = mounted / (paths[0] if paths and ".." not in paths[0] else "")
    folders = [
        folder,
        *(parent for parent in folder.parents if mounted in (parent, *parent.parents)),
    ]
    return [left for group in folders if (left := _left(group)) is not None]


def _left(group: Path) -> int | None:
    limit, current = group / "memory.max", group / "memory.current"
    if not limit.exists() or not current.exists() or limit.read_text().strip() == "max":
        return None
    stat = group / "memory.stat"
    lines = (line.split() for line in stat.read_text().splitlines()) if stat.exists() else ()
    cached = sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))
    return int(limit.read_text()) - int(current.read_text()) + cached
