"""Compile-only GPU targets."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge  # where a plugin's library is registered; jax has no public way
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels.backend import A100, H100, Target

PLUGIN = "jax_plugins.xla_cuda13"


@dataclass(frozen=True)
class Device:
    """One GPU; the figures are XLA's own descriptions and NVIDIA's data sheets."""

    target: Target
    kind: str
    architecture: str
    """As ptxas names it."""
    shared_bytes: int
    """Of shared memory that one block may ask for."""
    l2_bytes: int
    num_cores: int
    description: str
    """XLA's gpu_device_info."""


_COMMON = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
"""

DEVICES = {
    "sm_80": Device(
        A100,
        "NVIDIA A100",
        "sm_80",
        166_912,
        40 * 2**20,
        108,
        f"""gpu_device_info {{ {_COMMON}
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108
  fpus_per_core: 64 memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  cuda_compute_capability {{ major: 8 }}
}}
device_description_str: "NVIDIA A100-SXM4-80GB"
""",
    ),
    "sm_90a": Device(
        H100,
        "NVIDIA H100",
        "sm_90a",
        232_448,
        50 * 2**20,
        132,
        f"""gpu_device_info {{ {_COMMON}
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132
  fpus_per_core: 128 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
device_description_str: "NVIDIA H100 80GB HBM3"
""",
    ),
}

_RUNTIME = """
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
"""


def compile_only(device: Device) -> Any:
    """Returns a jax.Device that programs can be compiled for, and on which nothing can run.

    Raises:
      ModuleNotFoundError: the `deviceless` extra is not installed.
    """
    plugin = importlib.import_module(PLUGIN)
    assert plugin.__file__ is not None
    library = Path(plugin.__file__).resolve().parent / "xla_cuda_plugin.so"
    # The plugin's own entry point looks for a GPU and cuDNN first.
    xla_bridge.register_plugin("cuda", priority=-1, library_path=str(library), options={})
    topology = topologies.get_topology_desc(
        "gpu", platform="cuda", target_config=device.description + _RUNTIME, topology="1x1x1"
    )
    return topology.devices[0]


def lowered(function: Callable[..., Any], operands: tuple[Any, ...], device: Device) -> Any:
    """The function lowered for the device's platform, where no such device is.

    From jax 0.11 on, Pallas asks the mesh for the kind of GPU.
    """
    is_rocm = device.target.platform == "rocm"
    kind = AbstractDevice(
        device_kind="gfx942" if is_rocm else device.kind,
        num_cores=device.num_cores,
        platform="gpu",
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function).trace(*operands)
        return traced.lower(lowering_platforms=(device.target.platform,))
