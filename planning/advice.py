"""Advice on a plan: sentences on what dominates it and what to change."""

from planning.collectives import grouped
from planning.memory import USABLE
from planning.plan import Part, Plan
from planning.units import gigabytes, seconds


def advice(plan: Plan) -> list[str]:
    """On memory first, then on time; none on time where the device's rates are not known."""
    if plan.accelerator is None:
        return []
    return [*_on_memory(plan), *_on_time(plan)]


def _on_memory(plan: Plan) -> list[str]:
    assert plan.accelerator is not None
    memory, excess = plan.memory, plan.memory.excess(plan.accelerator.memory)
    usable = f"{gigabytes(USABLE * plan.accelerator.memory)} usable"
    if excess <= 0:
        return [f"It fits: {gigabytes(-excess)} of {usable} stay free."]
    shares = {
        **memory.arguments,
        "kept for the backward pass": memory.kept,
        "gradients": memory.gradients,
        "working memory": memory.working,
        "results": memory.results,
    }
    name = max(shares, key=lambda share: shares[share])
    found = [
        f"It does not fit: {gigabytes(excess)} more than the {usable}. The largest share is "
        f"{name}, {gigabytes(shares[name])}."
    ]
    state = memory.arguments.get("parameters", 0) + memory.arguments.get("optimiser", 0)
    if state > USABLE * plan.accelerator.memory:
        factor = state / (USABLE * plan.accelerator.memory)
        found.append(
            f"Parameters and optimiser alone take {factor:.1f} times what is usable: it takes at "
            f"least {factor:.1f} times the devices, on the axes data and expert."
        )
    elif name == "kept for the backward pass" and plan.run.execution.remat == "none":
        found.append("Recompute instead of keeping: --execution.remat full.")
    elif name in ("kept for the backward pass", "working memory"):
        found += _on_activations(plan)
    elif name == "cache":
        found.append("The cache grows with rows and length: fewer rows a device, or more devices.")
    else:
        found.append("Spread parameters, optimiser and gradients wider: a larger data axis.")
    return found


def _on_activations(plan: Plan) -> list[str]:
    largest = plan.memory.largest[0]
    size = gigabytes(largest.num_bytes)
    found = [f"The largest arrays are like {largest.array}, {size}, of {largest.part}."]
    if plan.step == "train":
        rows = plan.run.batch_size // plan.run.accumulation
        rows //= plan.run.mesh.data * plan.run.mesh.expert
        fewer = "fewer by --accumulation, " if rows > 1 else ""
        found.append(
            f"A device holds {rows} row(s) of {plan.run.data.seq_len:,} tokens at once: {fewer}"
            "shorter ones by --data.seq-len, or a tensor axis to share them."
        )
    return found


def _on_time(plan: Plan) -> list[str]:
    compute = sum(part.compute_seconds for part in plan.parts)
    waiting = plan.kernel_seconds - compute
    bounds = {"compute": compute, "memory": waiting, "network": plan.network_seconds}
    name = max(bounds, key=lambda bound: bounds[bound])
    if name == "network":
        return _on_network(plan)
    part = max(
        plan.parts,
        key=lambda p: p.compute_seconds if name == "compute" else _waiting(p),
    )
    if name == "compute":
        return [
            f"Arithmetic dominates, {seconds(compute)} at the peak rate, "
            f"{seconds(part.compute_seconds)} of it in {part.name}: what a faster step needs is "
            "more devices, less recomputation or fewer FLOPs."
        ]
    return [
        f"Traffic to the device's own memory dominates: {seconds(waiting)} beyond what the "
        f"arithmetic takes, {seconds(_waiting(part))} of it in {part.name}.{_hint(plan, part)}"
    ]


def _hint(plan: Plan, part: Part) -> str:
    """What makes the memory traffic of a part less."""
    execution, plain = plan.run.execution, ("xla", "reference")
    if part.name == "optimiser and metrics":
        return " It reads and writes the whole state: spread it wider, or do more tokens per step."
    if part.name == "attention" and execution.window_attention in plain:
        return " Scores go through memory: a fused attention kernel keeps them on the chip."
    if part.name == "routed experts" and execution.grouped_matmul in plain:
        return (
            " Small row tiles read an expert's weights again and again: more rows per expert, or a "
            "grouped kernel that keeps them on the chip."
        )
    if part.name == "routed experts" and execution.transport == "all_to_all":
        return " Rows go through buffers: a smaller capacity_factor makes those smaller."
    return ""


def _waiting(part: Part) -> float:
    """Seconds that kernels take for their bytes beyond those for their FLOPs."""
    return part.kernel_seconds - part.compute_seconds


def _on_network(plan: Plan) -> list[str]:
    assert plan.accelerator is not None
    sums = {
        key: sum(c.times * c.seconds(plan.accelerator) for c in members)
        for key, members in grouped(plan.collectives).items()
    }
    kind, axes = max(sums, key=lambda key: sums[key])
    text = (
        f"The network dominates: {seconds(plan.network_seconds)}, "
        f"{seconds(sums[kind, axes])} of it in {kind} over {' and '.join(axes) or 'other groups'}."
    )
    return [text + _network_hint(plan, kind, axes)]


def _network_hint(plan: Plan, kind: str, axes: tuple[str, ...]) -> str:
    per_node = plan.accelerator.devices_per_node if plan.accelerator else 0
    if "expert" in axes and kind == "all-to-all":
        return (
            f" Tokens travel to experts: an expert axis of at most {per_node} stays inside a node, "
            "a smaller capacity_factor sends less."
        )
    if axes == ("expert",) and plan.run.execution.transport == "gather":
        return " All tokens travel to all experts: try --execution.transport all_to_all."
    if "tensor" in axes:
        return f" A tensor axis belongs inside a node: at most {per_node}, or none."
    if "data" in axes:
        return (
            " Weights are gathered, and gradients scattered, for each micro-batch: more rows per "
            "device and step, less accumulation, or a smaller data axis."
        )
    return ""
