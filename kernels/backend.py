"""Target devices of the GPU kernels, and Pallas' calls to their compilers.

The only module that chooses between Pallas' GPU compilers and names their parameters. jax 0.11
deprecates the one in general use, Triton (Pallas changelog, July 2026): what replaces it changes
this file and the bodies of kernels, and no caller. The other, Mosaic, is for Hopper alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import triton as plgpu

from configs import accelerators
from formats.small_files import read_record

OLDEST_CUDA = accelerators.A100.capability
"""Compute capability, times ten, from which there are bfloat16 tensor cores."""
HOPPER = accelerators.H100.capability
"""That of the only GPUs with wgmma, which Mosaic's kernels are written in."""


@dataclass(frozen=True)
class Target:
    """The device that a kernel is traced for."""

    platform: Literal["cpu", "cuda", "interpret", "rocm", "tpu"]
    """interpret: Pallas' interpreter, which runs a kernel's grid step by step on any device."""
    capability: int = 0
    """CUDA's compute capability times ten (80: A100, 90: H100); 0 elsewhere."""


INTERPRET = Target("interpret")
A100, H100 = Target("cuda", OLDEST_CUDA), Target("cuda", HOPPER)


def current_target() -> Target:
    """The default device's: ask while tracing, never at import."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
    if device.platform not in ("cuda", "gpu", "rocm"):
        return Target(device.platform)
    if "rocm" in device.client.platform_version:
        return Target("rocm")
    return Target("cuda", round(float(device.compute_capability) * 10))


def runs_triton(target: Target) -> bool:
    if target.platform == "cuda":
        return target.capability >= OLDEST_CUDA
    return target.platform in ("interpret", "rocm")


def require_triton(target: Target) -> None:
    """Raises NotImplementedError where Triton's kernels can't run."""
    if runs_triton(target):
        return
    raise NotImplementedError(
        f"implementation='triton' needs a ROCm GPU or a CUDA one of compute capability "
        f"{OLDEST_CUDA / 10} or more, and the default device is {_described(target)}: take "
        "'auto' or 'xla'"
    )


def auto_takes_triton(target: Target) -> bool:
    """Whether "auto" means Triton: where it runs, and each device computes its own part.

    XLA can't split a kernel over a mesh: outside of shard_map, on more than one device, it would
    bring all operands to each of them.
    """
    return runs_triton(target) and not is_split_by_xla()


def is_split_by_xla() -> bool:
    """Whether XLA spreads what is traced here over several devices, as outside of shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    shared = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != manual for size, kind in shared)


def takes_triton(implementation: str) -> bool:
    """Whether an op's implementation, by name or as "auto" here and now, is its Triton kernel.

    Raises:
      NotImplementedError: it is named, and can't run on the default device.
    """
    target = current_target()
    if implementation == "triton":
        require_triton(target)
    return implementation == "triton" or (implementation == "auto" and auto_takes_triton(target))


def runs_mosaic(target: Target) -> bool:
    return target.platform == "interpret" or (
        target.platform == "cuda" and target.capability == HOPPER
    )


def require_mosaic() -> Target:
    """Returns the default device's target, for Mosaic's kernels asked for by name.

    Raises:
      NotImplementedError: they can't run there.
    """
    target = current_target()
    if runs_mosaic(target):
        return target
    raise NotImplementedError(
        "implementation='mosaic' needs a Hopper GPU (compute capability 9.0), and the default "
        f"device is {_described(target)}: take 'auto' or 'triton'"
    )


MEASURED = Path(__file__).with_name("measured.json")
"""Microseconds by capability, op, case and compiler, as scripts/gpu_report.py --write left them."""


@functools.cache
def measured() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """What MEASURED holds; nothing where it is missing.

    Raises:
      UserError: it is damaged.
    """
    by_case = dict[str, dict[str, dict[str, dict[str, float]]]]
    mend = f"git checkout {MEASURED} brings it back"
    return read_record(by_case, MEASURED, mend) if MEASURED.exists() else {}


def prefers_mosaic(op: str, target: Target) -> bool:
    """Whether "auto" takes Mosaic's kernel of an op where it can do what is asked.

    So it does where both compilers' kernels were timed on such a GPU, and Mosaic's took less time
    by the geometric mean over the cases.

    Args:
      op: "window_attention", or "grouped_matmul/" and a format of weights.
    """
    if target.platform != "cuda" or not runs_mosaic(target):
        return False
    cases = measured().get(str(target.capability), {}).get(op, {})
    ratios = [case["mosaic"] / case["triton"] for case in cases.values()]
    return math.prod(ratios) < 1.0 if ratios else False


def _described(target: Target) -> str:
    if target.platform == "cuda":
        return f"a GPU of compute capability {target.capability / 10}"
    return target.platform


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    num_programs: int,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    target: Target,
) -> Callable[..., Any]:
    """Returns a function of arrays that runs `kernel` once per program, in a grid of one dimension.

    Every ref holds its whole array. num_stages is the depth of the loops' software pipelines, for
    which ROCm has its own default.
    """
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(num_programs,),
        interpret=target.platform == "interpret",
        name=name,
        compiler_params=plgpu.CompilerParams(
            num_warps=num_warps, num_stages=None if target.platform == "rocm" else num_stages
        ),
    )


def mosaic_call(
    kernel: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    num_warpgroups: int,
    scratch: dict[str, Any],
    target: Target,
) -> Callable[..., Any]:
    """Returns a function of arrays that runs `kernel` once per core of the GPU.

    Programs loop over their work: there is one on each core of an H100 or H200 (SXM).

    Refs of operands and results lie in global memory, those of `scratch` in shared memory. The
    kernel asks for its `core` and `warpgroup` (lax.axis_index). Interpreted, it runs once, as each
    run is compiled anew; what it reads outside of an array is 0, as on a GPU, and races are found.
    """
    is_interpreted = target.platform == "interpret"
    return mosaic_gpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(1 if is_interpreted else accelerators.H100.num_cores,),
        grid_names=("core",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=mosaic_gpu.CompilerParams(
            approx_math=True,  # exponentials, as Triton's
            lowering_semantics=mosaic_gpu.LoweringSemantics.Lane,  # the layouts are the body's own
        ),
        interpret=_mosaic_interpreter() if is_interpreted else None,
    )


def _mosaic_interpreter() -> Any:
    # Public from jax 0.12 on; until then a user of a CPU or of a GPU does without it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )


# --- What bodies of Triton kernels are made of -----------------------------------------------


def divide(a: jax.Array, b: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of int32 that are not negative."""
    b = jnp.asarray(b, jnp.int32)
    return lax.div(a, b), lax.rem(a, b)


def span(start: jax.Array | int, size: int) -> jax.Array:
    """start, start + 1, ...: int32 [size]."""
    return start + lax.iota(jnp.int32, size)


def edge(start: jax.Array | int, size: int, limit: int) -> jax.Array | None:
    """Which of a span lie below the limit, bool [size]; None where all do, as `size` divides it."""
    return None if limit % size == 0 else span(start, size) < limit


def mask_of(
    shape: tuple[int, ...], rows: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array | None:
    """Where both hold, bool of the shape; None where there is nothing to ask."""
    masks = [] if rows is None else [jnp.broadcast_to(rows[:, None], shape)]
    masks += [] if columns is None else [jnp.broadcast_to(columns[None], shape)]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def load(ref: Any, mask: jax.Array | None = None) -> jax.Array:
    """What the ref holds; 0 where the mask is false, which is not read."""
    if mask is None:
        return plgpu.load(ref)
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    return plgpu.load(ref, mask=mask, other=zero)


def store(ref: Any, values: jax.Array, mask: jax.Array | None = None) -> None:
    """Writes values, in the ref's dtype, where the mask is true."""
    plgpu.store(ref, values.astype(ref.dtype), mask=mask)


def dot(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """float32 [M, N], summed in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a_MK.dtype == jnp.float32 else None
    return lax.dot(a_MK, b_KN, precision=precision, preferred_element_type=jnp.float32)
