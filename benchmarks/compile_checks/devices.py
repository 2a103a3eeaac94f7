"""Compile-only GPU targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from configs.accelerators import A100, H100, Accelerator
from kernels.backend import Target
from parallel.topology import compile_only_mesh


@dataclass(frozen=True)
class Device:
    """One GPU, for which kernels are chosen by its target and held to its limits."""

    target: Target
    accelerator: Accelerator


DEVICES = {x.architecture: Device(Target("cuda", x.capability), x) for x in (A100, H100)}


def compile_only(device: Device) -> Any:
    """Returns a jax.Device that programs can be compiled for, and on which nothing can run.

    Raises:
      UserError: the `deviceless` extra is not installed.
    """
    return compile_only_mesh(device.accelerator).devices.flat[0]


def lowered(function: Callable[..., Any], operands: tuple[Any, ...], device: Device) -> Any:
    """The function lowered for the device's platform, where no such device is.

    From jax 0.11 on, Pallas asks the mesh for the kind of GPU.
    """
    is_rocm = device.target.platform == "rocm"
    kind = AbstractDevice(
        device_kind="gfx942" if is_rocm else f"NVIDIA {device.accelerator.name.upper()}",
        num_cores=device.accelerator.num_cores,
        platform="gpu",
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function).trace(*operands)
        return traced.lower(lowering_platforms=(device.target.platform,))
