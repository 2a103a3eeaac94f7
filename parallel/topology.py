"""Meshes of accelerators (configs/accelerators.py) to compile for without having one.

They hold devices that XLA compiles for and nothing runs on. The compiler comes with JAX's CUDA
plugin, whose libraries need neither a GPU nor its driver for that.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from configs.accelerators import Accelerator
from configs.checks import UserError, require
from parallel.mesh import AXES

MAX_DEVICES = 2048
PLUGIN = "jax_plugins.xla_cuda13"
LIBRARY_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
"""The plugin's own switch, which only the environment reaches."""


def compile_only_mesh(
    accelerator: Accelerator, data: int = 1, expert: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh of devices that programs can be compiled for; nothing runs on them.

    Neighbours in the mesh, the tensor axis first, share a node.

    Raises:
      UserError: too many devices, nodes that would be partly used, or no CUDA plugin.
    """
    count, per_node = data * expert * tensor, accelerator.devices_per_node
    mesh = f"the mesh data={data} x expert={expert} x tensor={tensor}"
    require(
        count <= MAX_DEVICES,
        f"{mesh} needs {count:,} devices, at most {MAX_DEVICES:,} can be compiled for: make the "
        "mesh smaller",
    )
    require(
        count <= per_node or count % per_node == 0,
        f"{mesh} has {count} devices, which must be at most {per_node} or a multiple of the "
        f"{per_node} of a node: change the mesh",
    )
    require_plugin()
    local = min(count, per_node)
    devices = np.array(_devices(accelerator, f"1x{count // local}x{local}"))
    axis_types = (AxisType.Auto,) * len(AXES)
    return Mesh(devices.reshape(data, expert, tensor), AXES, axis_types=axis_types)


def _devices(accelerator: Accelerator, shape: str) -> list[Any]:
    """Devices to compile for, in a shape such as "1x4x8": partitions, nodes, devices of a node."""

    def describe() -> list[Any]:
        return topologies.get_topology_desc(
            accelerator.name, platform="cuda", target_config=accelerator.xla_target, topology=shape
        ).devices

    with _without_library_check():
        try:
            return describe()
        except NotImplementedError:  # JAX has looked for plugins before, with the check
            importlib.import_module(PLUGIN).initialize()
            return describe()


@contextlib.contextmanager
def _without_library_check() -> Iterator[None]:
    """When JAX registers the plugin it looks for cuDNN and others, which only running needs."""
    before = os.environ.get(LIBRARY_CHECK)
    os.environ[LIBRARY_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIBRARY_CHECK]
        else:
            os.environ[LIBRARY_CHECK] = before


def require_plugin() -> None:
    """
    Raises:
      UserError: JAX's CUDA plugin is not installed.
    """
    package = PLUGIN.partition(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(PLUGIN) is None:
        raise UserError(
            "compiling for a GPU needs jax-cuda13-plugin, which is not installed: "
            '`make plan ARGS="RUN --device h100"` plans in an environment of its own that has it, '
            "without a GPU or its driver"
        )
