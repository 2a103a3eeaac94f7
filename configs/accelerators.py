"""Accelerators as their makers' data sheets and XLA describe them: the one place of such figures.

Standard library only. Kernels ask for a device's cores and compute capability, compile checks for
its memories, the planner for all of it. Bandwidths are bytes per second in one direction; all
figures are the makers' peaks.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device, and how its nodes are wired."""

    name: str
    description: str
    """What JAX calls such a device (device_kind)."""
    capability: int
    """CUDA's compute capability, times ten."""
    architecture: str
    """As ptxas names it."""

    num_cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    shared_bytes: int
    """Of shared memory that one block may ask for."""
    l2_bytes: int
    memory: int
    """Bytes that the driver reports."""
    memory_bandwidth: float
    xla_bandwidth: int
    """The same in XLA's description of the device, where data sheets round."""

    flops_16: float
    """Dense bfloat16 or float16 FLOP/s."""
    flops_32: float
    """FLOP/s of float32 products as XLA runs them by default: TF32, dense."""
    flops_8: float
    """Dense FLOP/s of products in fp8; 0 where there are none."""
    flops_exact: float
    """FLOP/s of float32 without tensor cores."""

    node_bandwidth: float
    """From one device to the others of its node."""
    network_bandwidth: float
    """From one device to other nodes: its own network card."""
    devices_per_node: int
    sources: str
    """Where the figures come from."""

    @property
    def xla_target(self) -> str:
        """The device in XLA's own words (a text GpuTargetConfigProto)."""
        major, minor = divmod(self.capability, 10)
        features = "feature_extension: ACCELERATED_FEATURES" if self.architecture[-1] == "a" else ""
        return _XLA_TARGET.format(
            self,
            shared_bytes_of_core=self.shared_bytes + 1024,
            version=f"major: {major} {f'minor: {minor}' if minor else ''} {features}",
        )


_XLA_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_bytes_of_core} threads_per_core_limit: 2048
  core_count: {0.num_cores} fpus_per_core: {0.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {0.xla_bandwidth} l2_cache_size: {0.l2_bytes} clock_rate_ghz: {0.clock_ghz}
  device_memory_size: {0.memory} shared_memory_per_block_optin: {0.shared_bytes}
  cuda_compute_capability {{ {version} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{0.description}"
"""

_MEMORY_80GB = 84_942_979_072

H100 = Accelerator(
    name="h100",
    description="NVIDIA H100 80GB HBM3",
    capability=90,
    architecture="sm_90a",
    num_cores=132,
    fpus_per_core=128,
    clock_ghz=1.98,
    shared_bytes=232_448,
    l2_bytes=50 * 2**20,
    memory=_MEMORY_80GB,
    memory_bandwidth=3.35e12,
    xla_bandwidth=3_352_320_000_000,
    flops_16=989.4e12,
    flops_32=494.7e12,
    flops_8=1978.9e12,
    flops_exact=66.9e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
    devices_per_node=8,
    sources="NVIDIA H100 SXM data sheet (dense: half of the figures with sparsity; NVLink 900 GB/s "
    "both ways) and DGX H100: one 400 Gb/s ConnectX-7 per GPU",
)

H200 = replace(
    H100,
    name="h200",
    description="NVIDIA H200",
    memory=141_000_000_000,
    memory_bandwidth=4.8e12,
    xla_bandwidth=4_800_000_000_000,
    sources="NVIDIA H200 SXM data sheet: the arithmetic of an H100, 141 GB at 4.8 TB/s",
)

A100 = Accelerator(
    name="a100",
    description="NVIDIA A100-SXM4-80GB",
    capability=80,
    architecture="sm_80",
    num_cores=108,
    fpus_per_core=64,
    clock_ghz=1.41,
    shared_bytes=166_912,
    l2_bytes=40 * 2**20,
    memory=_MEMORY_80GB,
    memory_bandwidth=2.039e12,
    xla_bandwidth=2_039_000_000_000,
    flops_16=312e12,
    flops_32=156e12,
    flops_8=0.0,
    flops_exact=19.5e12,
    node_bandwidth=300e9,
    network_bandwidth=25e9,
    devices_per_node=8,
    sources="NVIDIA A100 80GB SXM data sheet (dense; NVLink 600 GB/s both ways) and DGX A100: one "
    "200 Gb/s ConnectX-6 per GPU",
)

ACCELERATORS = {"h100": H100, "a100": A100}
"""Those that programs are planned for."""


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The data sheet of a device by the kind that jax says it is; None: not known.

    Those without NVLink (PCIe, NVL) have slower clocks or memory than the SXM ones known here.
    """
    if any(word in device_kind for word in ("PCIe", "NVL", "GH200", "40GB")):
        return None
    return next((x for x in (H100, H200, A100) if x.name.upper() in device_kind), None)


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """A device as choosing how to serve sees it (planning/inference.py): memory and peak rates."""

    name: str
    description: str
    platform: Literal["cuda", "rocm", "cpu", "unknown"]
    capability: int = 0
    """CUDA's compute capability, times ten."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    flops_32: float
    """FLOP/s of float32 products as XLA runs them by default."""
    flops_16: float
    """FLOP/s of products in bfloat16."""
    sources: str


def _sheet_of(accelerator: Accelerator) -> DataSheet:
    return DataSheet(
        name=accelerator.name,
        description=accelerator.description,
        platform="cuda",
        capability=accelerator.capability,
        memory=accelerator.memory,
        memory_bandwidth=accelerator.memory_bandwidth,
        flops_32=accelerator.flops_32,
        flops_16=accelerator.flops_16,
        sources=accelerator.sources,
    )


MI300X = DataSheet(
    name="mi300x",
    description="AMD Instinct MI300X",
    platform="rocm",
    memory=192e9,
    memory_bandwidth=5.3e12,
    flops_32=163.4e12,
    flops_16=1307.4e12,
    sources="AMD Instinct MI300X data sheet (dense; float32 by matrix cores)",
)

MI250X = DataSheet(
    name="mi250x",
    description="AMD Instinct MI250X",
    platform="rocm",
    memory=64e9,
    memory_bandwidth=1.6384e12,
    flops_32=47.85e12,
    flops_16=191.5e12,
    sources="AMD Instinct MI250X data sheet, halved: JAX sees each of its two dies as a device",
)

CPU = DataSheet(
    name="cpu",
    description="a host of four cores",
    platform="cpu",
    memory=16e9,
    memory_bandwidth=51.2e9,
    flops_32=384e9,
    flops_16=384e9,
    sources="two channels of DDR4-3200; four cores with AVX2 (two products of 8 float32 a cycle) "
    "at 3 GHz",
)

UNKNOWN = DataSheet(
    name="unknown",
    description="a device that is not in the table",
    platform="unknown",
    memory=8e9,
    memory_bandwidth=20e9,
    flops_32=100e9,
    flops_16=100e9,
    sources="nobody: below every other row of the table",
)

DATA_SHEETS = {
    sheet.name: sheet
    for sheet in (*map(_sheet_of, (H200, H100, A100)), MI300X, MI250X, CPU, UNKNOWN)
}
"""Those that serving is planned for."""


def data_sheet_of(device_kind: str) -> DataSheet:
    """The data sheet of a device by the kind that jax says it is; UNKNOWN: it has none."""
    accelerator = accelerator_of(device_kind)
    if accelerator is not None:
        return DATA_SHEETS[accelerator.name]
    return next((x for x in (MI300X, MI250X) if x.name.upper() in device_kind), UNKNOWN)
