"""Accelerators as their data sheets describe them, and meshes of them to compile for without one.

A mesh made here holds devices that XLA compiles for and nothing runs on. The compiler comes with
JAX's CUDA plugin, whose libraries need neither a GPU nor its driver for that.

Bandwidths are bytes per second in one direction. All figures are the makers' peaks.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from configs.checks import UserError, require
from parallel.mesh import AXES

MAX_DEVICES = 2048
PLUGIN = "jax_plugins.xla_cuda13"
LIBRARY_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
"""The plugin's own switch, which only the environment reaches."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device, and how its nodes are wired."""

    name: str
    memory: int
    """Bytes that the driver reports."""
    flops_16: float
    """Dense bfloat16 or float16 FLOP/s."""
    flops_32: float
    """FLOP/s of float32 products as XLA runs them by default: TF32, dense."""
    flops_8: float
    """Dense FLOP/s of products in fp8; 0 where there are none."""
    flops_exact: float
    """FLOP/s of float32 without tensor cores."""
    memory_bandwidth: float
    node_bandwidth: float
    """From one device to the others of its node."""
    network_bandwidth: float
    """From one device to other nodes: its own network card."""
    devices_per_node: int
    sources: str
    """Where the figures come from."""
    target: str
    """The device in XLA's own words (a text GpuTargetConfigProto)."""


_CUDA_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core} threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth} l2_cache_size: {l2_cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {shared_memory}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{description}"
"""

_MEMORY_80GB = 84_942_979_072

H100 = Accelerator(
    name="h100",
    memory=_MEMORY_80GB,
    flops_16=989.4e12,
    flops_32=494.7e12,
    flops_8=1978.9e12,
    flops_exact=66.9e12,
    memory_bandwidth=3.35e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
    devices_per_node=8,
    sources="NVIDIA H100 SXM data sheet (dense: half of the figures with sparsity; NVLink 900 GB/s "
    "both ways) and DGX H100: one 400 Gb/s ConnectX-7 per GPU",
    target=_CUDA_TARGET.format(
        shared_memory_per_core=233_472,
        cores=132,
        fpus_per_core=128,
        memory_bandwidth=3_352_320_000_000,
        l2_cache=52_428_800,
        clock=1.98,
        memory=_MEMORY_80GB,
        shared_memory=232_448,
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        description="NVIDIA H100 80GB HBM3",
    ),
)

A100 = Accelerator(
    name="a100",
    memory=_MEMORY_80GB,
    flops_16=312e12,
    flops_32=156e12,
    flops_8=0.0,
    flops_exact=19.5e12,
    memory_bandwidth=2.039e12,
    node_bandwidth=300e9,
    network_bandwidth=25e9,
    devices_per_node=8,
    sources="NVIDIA A100 80GB SXM data sheet (dense; NVLink 600 GB/s both ways) and DGX A100: one "
    "200 Gb/s ConnectX-6 per GPU",
    target=_CUDA_TARGET.format(
        shared_memory_per_core=167_936,
        cores=108,
        fpus_per_core=64,
        memory_bandwidth=2_039_000_000_000,
        l2_cache=41_943_040,
        clock=1.41,
        memory=_MEMORY_80GB,
        shared_memory=166_912,
        capability="major: 8",
        description="NVIDIA A100-SXM4-80GB",
    ),
)

ACCELERATORS = {"h100": H100, "a100": A100}
"""Those that programs are planned for."""

H200 = replace(
    H100,
    name="h200",
    memory=141_000_000_000,
    memory_bandwidth=4.8e12,
    sources="NVIDIA H200 SXM data sheet: the arithmetic of an H100, 141 GB at 4.8 TB/s",
    target=H100.target.replace("3352320000000", "4800000000000")
    .replace(str(_MEMORY_80GB), "141000000000")
    .replace("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
)


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The data sheet of a device by the kind that jax says it is; None: not known.

    Those without NVLink (PCIe, NVL) have slower clocks or memory than the SXM ones known here.
    """
    if any(word in device_kind for word in ("PCIe", "NVL", "GH200", "40GB")):
        return None
    return next((x for x in (H100, H200, A100) if x.name.upper() in device_kind), None)


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
            accelerator.name, platform="cuda", target_config=accelerator.target, topology=shape
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
