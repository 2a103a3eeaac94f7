"""The device mesh: axes data, expert and tensor."""

import math

import jax
from jax.sharding import AxisType, Mesh

from configs.checks import UserError

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")

BATCH_AXES = (DATA, EXPERT)
"""Mesh axes that split the batch: the expert axis is a data axis outside the experts."""


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh over the first data * expert * tensor devices.

    Raises:
      UserError: there are fewer devices than that, or several processes have more: one of them
        would be left out.
    """
    sizes = (data, expert, tensor)
    needed, found = math.prod(sizes), jax.device_count()
    if needed > found:
        raise UserError(
            f"the mesh data={data} x expert={expert} x tensor={tensor} needs {needed} devices, "
            f"found {found} of kind {jax.devices()[0].platform}: make the mesh smaller"
        )
    if jax.process_count() > 1 and needed < found:
        raise UserError(
            f"the mesh data={data} x expert={expert} x tensor={tensor} has {needed} devices, and "
            f"the {jax.process_count()} processes have {found}: make the mesh larger, or start "
            "fewer processes"
        )
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:needed]
    )


def axis_sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use (`jax.set_mesh`); all 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: 1 if mesh.empty else mesh.shape[axis] for axis in AXES}
