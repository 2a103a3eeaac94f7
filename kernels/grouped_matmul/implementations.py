"""The implementations of grouped products in the order in which "auto" tries them.

"auto" takes the first kernel that runs here, can do what is asked, and was not measured to be
slower than the next; plain XLA where none does. Weights of few bits that the kernels here can't
read are an error: XLA would make floats of all of them for each product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels import backend, native
from kernels.backend import Target
from kernels.grouped_matmul import (
    automatic,
    cpu,
    cpu_quantized,
    pallas_mosaic,
    pallas_mosaic_quantized,
    pallas_triton,
    pallas_triton_quantized,
    reference,
    xla,
    xla_quantized,
)
from kernels.grouped_matmul.pallas_triton import swiglu_of_halves
from kernels.grouped_matmul.request import GATE_AND_UP, Request
from kernels.grouped_matmul.tiles import Tiles, choose_quantized_tiles, choose_tiles
from kernels.quantize import QTensor
from kernels.quantize.packing import unpack_scales

MOSAIC_ROWS = 128
"""Of a group on average, from which "auto" takes Mosaic's kernel: its tiles have so many."""
FIXED_ROWS = 64
"""Of a group, which tiles are chosen for where the order of sums must not depend on the rows."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation, as the table below has it."""

    runs_here: Callable[[Request], bool]
    """Whether "auto" may take it on this device, whatever the weights are."""
    require: Callable[[Target], object]
    """Raises NotImplementedError where it is asked for by name and can't run."""
    unsupported_reason: Callable[[Request], str | None]
    """Why it can't do what is asked, in a sentence that says what to do; None: it can."""
    is_slower: Callable[[Request], bool] = lambda request: False
    """Whether it was measured to be slower here than those after it."""
    run: Callable[[Request], jax.Array]
    adds_offsets: bool = False
    """Whether it reads a QTensor's offsets; what others leave out is added here."""

    def multiply(self, request: Request) -> jax.Array:
        """Runs it."""
        return self.run(request) if self.adds_offsets else _with_offsets(request, self.run)


def multiply(request: Request) -> jax.Array:
    """The product by the implementation that is named, or that "auto" chooses.

    Raises:
      NotImplementedError: it can't do this here.
    """
    name = request.implementation
    if name in KERNELS:
        kernel = KERNELS[name]
        kernel.require(request.target)
        reason = kernel.unsupported_reason(request)
        if reason is not None:
            raise NotImplementedError(reason)
        return kernel.multiply(request)
    if name == "auto":
        return _multiply_automatically(request)
    reason = _plain_reason(request)
    if reason is not None:
        raise NotImplementedError(reason)
    return _multiply_plainly(request)


def _multiply_automatically(request: Request) -> jax.Array:
    here = [kernel for kernel in KERNELS.values() if kernel.runs_here(request)]
    reasons = [kernel.unsupported_reason(request) for kernel in here]
    able = [kernel for kernel, reason in zip(here, reasons, strict=True) if reason is None]
    chosen = next((kernel for kernel in able if not kernel.is_slower(request)), None)
    if chosen is not None:
        return chosen.multiply(request)
    if reasons and (isinstance(request.weight, QTensor) or request.fixed_order):
        raise NotImplementedError(reasons[-1])
    reason = _plain_reason(request)
    if reason is not None:
        raise NotImplementedError(reason)
    return _multiply_plainly(request)


def _with_offsets(request: Request, run: Callable[[Request], jax.Array]) -> jax.Array:
    """The product by what knows values and scales alone: offsets meet the sums of x's blocks."""
    weight = request.weight
    if not isinstance(weight, QTensor) or weight.offsets is None:
        return run(request)
    y_RN = run(replace(request, weight=replace(weight, offsets=None), gated=False))
    x_RK, offsets_ESN = request.sorted_x, unpack_scales(weight.offsets, weight.packing)
    blocks_RSZ = x_RK.reshape(x_RK.shape[0], -1, weight.block_size)
    sums_RS = blocks_RSZ.sum(-1, dtype=jnp.float32).astype(x_RK.dtype)
    is_plain = request.implementation in ("reference", "xla")
    of_offsets = replace(
        request,
        x_TK=sums_RS,
        weight=lax.stop_gradient(offsets_ESN).astype(sums_RS.dtype),
        outputs_first=False,
        rows_R=None,
        gated=False,
        activations="auto",
        implementation=request.implementation if is_plain else "auto",
    )
    return _gate(request, y_RN + multiply(of_offsets))


# --- Plain XLA and the reference -----------------------------------------------------------------


def _plain_reason(request: Request) -> str | None:
    if request.fixed_order and request.implementation != "reference":
        return "XLA promises no order of sums: fixed_order needs the kernels of a CPU or a GPU"
    return None


def _multiply_plainly(request: Request) -> jax.Array:
    return _with_offsets(request, _run_plainly)


def _run_plainly(request: Request) -> jax.Array:
    if isinstance(request.weight, QTensor):
        request = xla_quantized.widened(request)
    product = {"reference": reference, "xla": xla}.get(request.implementation, automatic)
    w_EKN = request.array_EKN.astype(request.x_TK.dtype)
    return _gate(request, product.grouped_matmul(request.sorted_x, w_EKN, request.group_sizes_E))


def _gate(request: Request, y_RN: jax.Array) -> jax.Array:
    return swiglu_of_halves(checkpoint_name(y_RN, GATE_AND_UP)) if request.gated else y_RN


# --- CPU -----------------------------------------------------------------------------------------


def runs_native(target: Target) -> bool:
    """Whether a program for this target takes the native CPU kernels."""
    is_cpu = target.platform == "cpu" and jax.default_backend() == "cpu"
    return is_cpu and native.is_available()


def _cpu_reason(request: Request) -> str | None:
    if isinstance(request.weight, QTensor):
        return cpu_quantized.unsupported_reason(request)
    if not {request.x_TK.dtype, request.weight.dtype} <= set(native.FLOATS):
        return (
            "the CPU kernels multiply float32 and bfloat16, x is "
            f"{request.x_TK.dtype} and w {request.weight.dtype}: cast them"
        )
    return None


def _run_cpu(request: Request) -> jax.Array:
    """By name: here. As "auto": by the platform that the program is lowered for."""
    is_plain = not (isinstance(request.weight, QTensor) or request.weight_is_mixed)
    if is_plain and not request.fixed_order:  # what training multiplies, with its gradients
        product = cpu if request.implementation == "cpu" else automatic
        operands = (request.sorted_x, request.array_EKN, request.group_sizes_E)
        return _gate(request, product.grouped_matmul(*operands))
    if request.implementation == "cpu":
        return _multiply_natively(request)

    def by(run: Callable[[Request], jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, weight, sizes, rows: run(
            replace(request, x_TK=x, weight=weight, group_sizes_E=sizes, rows_R=rows)
        )

    operands = (request.x_TK, request.weight, request.group_sizes_E, request.rows_R)
    return lax.platform_dependent(
        *operands, cpu=by(_multiply_natively), default=by(_multiply_plainly)
    )


def _multiply_natively(request: Request) -> jax.Array:
    weight, x_RK, sizes_E = request.weight, request.sorted_x, request.group_sizes_E
    if isinstance(weight, QTensor):
        return cpu_quantized.multiply(request)
    if not request.weight_is_mixed:
        y_RN = cpu.rows_times_matrix(x_RK, weight, sizes_E, transpose=request.outputs_first)
    else:
        y_RN = cpu.rows_times_bfloat16(
            x_RK,
            weight,
            sizes_E,
            activations=request.activations,
            outputs_first=request.outputs_first,
            fixed_order=request.fixed_order,
        )
    return _gate(request, y_RN)


# --- GPUs ----------------------------------------------------------------------------------------


def _gpu_reason(request: Request) -> str | None:
    if request.activations == "int8":
        return "GPU kernels do not round rows to int8: pass activations='float'"
    if request.weight_is_mixed:
        return f"GPU kernels multiply one dtype, x is {request.x_TK.dtype}: cast it"
    return None


def _mosaic_reason(request: Request) -> str | None:
    weight, target = request.weight, request.target
    if isinstance(weight, QTensor):
        return _gpu_reason(request) or pallas_mosaic_quantized.unsupported_reason(
            request.x_TK, weight, gated=request.gated, target=target
        )
    if request.gated and request.implementation == "mosaic":
        return "the Mosaic kernel multiplies quantized weights: pass a QTensor, or take 'triton'"
    return _gpu_reason(request) or pallas_mosaic.unsupported_reason(
        request.x_TK, request.array_EKN, target
    )


def _mosaic_is_slower(request: Request) -> bool:
    """Of an array its product makes up, with many rows, for gate and up that are written out."""
    weight = request.weight
    if isinstance(weight, QTensor):
        return not backend.prefers_mosaic(f"grouped_matmul/{weight.format}", request.target)
    has_many_rows = request.num_rows >= MOSAIC_ROWS * request.num_groups
    return not (has_many_rows and backend.prefers_mosaic("grouped_matmul/bf16", request.target))


def _run_mosaic(request: Request) -> jax.Array:
    weight, target, rows_R = request.weight, request.target, request.rows_R
    if not isinstance(weight, QTensor):
        y_RN = pallas_mosaic.grouped_matmul(
            request.x_TK, request.array_EKN, request.group_sizes_E, rows_R=rows_R, target=target
        )
        return _gate(request, y_RN)
    kernel, tiles = pallas_mosaic_quantized, None
    if request.fixed_order:
        tiles = kernel.choose_tiles(FIXED_ROWS, gated=request.gated, target=target)
    return kernel.grouped_matmul(
        request.x_TK,
        weight,
        request.group_sizes_E,
        rows_R=rows_R,
        gated=request.gated,
        target=target,
        tiles=tiles,
    )


def _triton_reason(request: Request) -> str | None:
    reason = _gpu_reason(request)
    if reason is not None or not isinstance(request.weight, QTensor):
        return reason
    return pallas_triton_quantized.unsupported_reason(request.x_TK, request.weight, request.target)


def _run_triton(request: Request) -> jax.Array:
    weight, target = request.weight, request.target
    x_TK, sizes_E, rows_R = request.x_TK, request.group_sizes_E, request.rows_R
    tiles = _fixed_triton_tiles(request) if request.fixed_order else None
    if isinstance(weight, QTensor):
        return pallas_triton_quantized.grouped_matmul(
            x_TK, weight, sizes_E, rows_R=rows_R, gated=request.gated, target=target, tiles=tiles
        )
    op = pallas_triton.grouped_swiglu if request.gated else pallas_triton.grouped_matmul
    return op(x_TK, request.array_EKN, sizes_E, rows_R=rows_R, target=target, tiles=tiles)


def _fixed_triton_tiles(request: Request) -> Tiles:
    target, gated, num_outputs = request.target, request.gated, request.num_outputs
    if isinstance(request.weight, QTensor):
        return choose_quantized_tiles(FIXED_ROWS, num_outputs, target=target, gated=gated)
    num_inputs, itemsize = request.x_TK.shape[1], request.x_TK.dtype.itemsize
    return choose_tiles(
        FIXED_ROWS, num_inputs, num_outputs, target=target, itemsize=itemsize, gated=gated
    )


def _runs_triton(request: Request) -> bool:
    return backend.auto_takes_triton(request.target)


KERNELS = {
    "mosaic": Kernel(
        runs_here=lambda request: _runs_triton(request) and backend.runs_mosaic(request.target),
        require=lambda target: backend.require_mosaic(),
        unsupported_reason=_mosaic_reason,
        is_slower=_mosaic_is_slower,
        run=_run_mosaic,
    ),
    "triton": Kernel(
        runs_here=_runs_triton,
        require=backend.require_triton,
        unsupported_reason=_triton_reason,
        run=_run_triton,
    ),
    "cpu": Kernel(
        runs_here=lambda request: runs_native(request.target),
        require=lambda target: None,
        unsupported_reason=_cpu_reason,
        run=_run_cpu,
        adds_offsets=True,
    ),
}
"""By name, the fastest first."""
