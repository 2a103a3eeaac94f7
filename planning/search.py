"""Search for a run's mesh and recomputation: all are estimated, the best are compiled."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from configs.accelerators import Accelerator
from configs.base import MeshConfig, RunConfig
from configs.checks import UserError, require
from parallel.topology import compile_only_mesh
from planning.estimate import Estimate, Weights, estimate, weights_of
from planning.memory import USABLE
from planning.plan import Plan, make_plan


@dataclass(frozen=True)
class Candidate:
    run: RunConfig
    estimate: Estimate


@dataclass(frozen=True)
class Found:
    """A candidate and its plan."""

    candidate: Candidate
    plan: Plan


def candidates(run: RunConfig, accelerator: Accelerator) -> list[Candidate]:
    """Every mesh of as many devices as the run's, with and without recomputation, the best first:
    what fits by the estimate before what does not, then the faster.

    The batch over all devices stays the run's.

    Raises:
      UserError: nothing divides the model and the batch.
    """
    weights, room = weights_of(run), USABLE * accelerator.memory
    variants = _variants(run, accelerator)
    found = [c for c in (_candidate(x, weights, accelerator) for x in variants) if c is not None]
    require(
        bool(found),
        f"no mesh of {run.mesh.num_devices} devices divides {run.name}'s model and its "
        f"batch_size={run.batch_size}: change the number of devices or the batch",
    )
    return sorted(found, key=lambda c: (max(c.estimate.memory, room), c.estimate.seconds))


def search(run: RunConfig, accelerator: Accelerator, count: int) -> list[Found]:
    """The best candidates by estimate, compiled, and ranked anew by what their programs say."""
    found = []
    for candidate in candidates(run, accelerator)[:count]:
        mesh = compile_only_mesh(accelerator, **dataclasses.asdict(candidate.run.mesh))
        found.append(Found(candidate, make_plan(candidate.run, "train", mesh, accelerator)))
    room = USABLE * accelerator.memory
    return sorted(found, key=lambda x: (max(x.plan.memory.total, room), x.plan.hidden_seconds))


def _variants(run: RunConfig, accelerator: Accelerator) -> Iterator[RunConfig]:
    for mesh in _meshes(run.mesh.num_devices, accelerator.devices_per_node):
        for remat in ("none", "full"):
            execution = dataclasses.replace(run.execution, remat=remat)
            try:
                yield dataclasses.replace(run, mesh=mesh, execution=execution)
            except UserError:  # the batch or the experts can't be split so
                continue


def _meshes(devices: int, most_tensor: int) -> Iterator[MeshConfig]:
    """Every split of the devices over the axes; a tensor axis within a node."""
    for tensor in range(1, min(devices, most_tensor) + 1):
        for expert in range(1, devices // tensor + 1):
            if devices % (tensor * expert) == 0:
                yield MeshConfig(data=devices // (tensor * expert), expert=expert, tensor=tensor)


def _candidate(run: RunConfig, weights: Weights, accelerator: Accelerator) -> Candidate | None:
    """None where the mesh does not divide a weight that it splits."""
    try:
        return Candidate(run, estimate(run, weights, accelerator))
    except UserError:
        return None
