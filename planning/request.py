"""The run that a plan is asked for: a named run, its overrides, and the mesh in short form."""

import dataclasses
from collections.abc import Sequence

from configs.base import MeshConfig, RunConfig
from configs.checks import UserError, require
from configs.cli import load_run, named_run

MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def planned_run(
    name: str, mesh: str | None, overrides: Sequence[str], own_options: Sequence[str] = ()
) -> RunConfig:
    """The named run on this mesh.

    Without --batch-size among the overrides, a device keeps as many rows as in the run: the batch
    grows and shrinks with the mesh.

    Args:
      own_options: of the verb; see load_run.
      mesh: such as "data=32,expert=64"; axes left out have size 1. None keeps the run's.
    Raises:
      UserError: an unknown run or axis, or settings that don't go together.
    """
    if mesh is None:
        return load_run(name, overrides, own_options)
    require(
        not any(_is_set(f"--mesh.{axis}", overrides) for axis in MESH_AXES),
        f"--mesh {mesh} and an override of --mesh.*: give one of them",
    )
    sizes = parse_mesh(mesh)
    chosen = [
        word
        for axis, size in dataclasses.asdict(sizes).items()
        for word in (f"--mesh.{axis}", str(size))
    ]
    if not _is_set("--batch-size", overrides):
        run = named_run(name)
        rows = run.batch_size // (run.mesh.data * run.mesh.expert)
        chosen += ["--batch-size", str(rows * sizes.data * sizes.expert)]
    return load_run(name, [*chosen, *overrides], own_options)


def parse_mesh(text: str) -> MeshConfig:
    """
    Raises:
      UserError: not of the form axis=size,axis=size.
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, size = entry.partition("=")
        require(
            axis in MESH_AXES and axis not in sizes and size.isdecimal(),
            f"--mesh {text} must be sizes of the axes {', '.join(MESH_AXES)}, each once, such as "
            f"data=16,expert=32; {entry!r} is none",
        )
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except UserError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def _is_set(option: str, overrides: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in overrides)
