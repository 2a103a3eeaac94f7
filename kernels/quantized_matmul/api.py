"""The signatures of quantized_matmul and quantized_swiglu, their checks, and the implementation.

R rows sorted by group, E groups (experts), K inputs, N outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from kernels import native
from kernels.backend import current_target, require_mosaic, takes_triton
from kernels.grouped_matmul import pallas_mosaic_quantized, pallas_triton_quantized
from kernels.quantize import QTensor
from kernels.quantized_matmul import cpu, reference, xla

Implementation = Literal["auto", "reference", "xla", "cpu", "triton", "mosaic"]
Activations = Literal["float", "int8"]


def quantized_matmul(
    x_RK: jax.Array,
    weight: QTensor,
    group_sizes_E: jax.Array | None = None,
    *,
    activations: Activations = "float",
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns x @ w, or x[r] @ w[group of r], [R, N] in x's dtype.

    Args:
      x_RK: float [R, K]; with group sizes, rows sorted by group.
      weight: [K, N], or with group sizes [E, K, N].
      group_sizes_E: int32 [E], each >= 0, summing to at most R; rows past the last group are
        unspecified but finite. None: one group of all rows.
      activations: "float" multiplies x as it is; "int8" rounds it to 8 bits with a scale per row
        and block of inputs, which is faster where the processor, not memory, is the limit.
      implementation: "reference" makes floats of all weights and multiplies every row with every
        matrix; "xla" makes floats of them; "cpu" is C++ on int8 and int4 weights in the order
        "panels"; "triton" is a GPU kernel of one weight, whose int4 lie in the order "split_128";
        "mosaic" is one for Hopper alone, whose weights lie in the order "canonical"; "auto" takes
        "mosaic" where it was measured to be faster (kernels/backend.py), "triton" or "cpu" where
        they can, and "xla" elsewhere.
    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the implementation asked for can't do this here.
    Numerics: "float" within 1e-5 relative of dequantize(weight) in float32; "cpu" may hold each x
      of up to four rows to 2^-23 of its block's largest |x|. "int8" adds at most half a step per
      input, |error| <= sum over k of |w[k]| * (largest |x| of k's block) / 254. A row that is not
      finite has results that are not.
    """
    _check(x_RK, (weight,), group_sizes_E)
    return _run(
        (weight,),
        x_RK,
        group_sizes_E,
        activations,
        implementation,
        {"cpu": cpu.quantized_matmul, "xla": xla.quantized_matmul}
        | {"reference": reference.quantized_matmul},
    )


def quantized_swiglu(
    x_RK: jax.Array,
    gate: QTensor,
    up: QTensor,
    group_sizes_E: jax.Array | None = None,
    *,
    activations: Activations = "float",
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns silu(x gate) * (x up), [R, N]: both products and the gate in one pass.

    Arguments, errors and numerics are quantized_matmul's; gate and up have the same shape, format
    and blocks.
    """
    _check(x_RK, (gate, up), group_sizes_E)
    return _run(
        (gate, up),
        x_RK,
        group_sizes_E,
        activations,
        implementation,
        {"cpu": cpu.quantized_swiglu, "xla": xla.quantized_swiglu}
        | {"reference": reference.quantized_swiglu},
    )


def _run(
    weights: tuple[QTensor, ...],
    x_RK: jax.Array,
    group_sizes_E: jax.Array | None,
    activations: Activations,
    implementation: Implementation,
    functions: dict[str, Callable[..., jax.Array]],
) -> jax.Array:
    if group_sizes_E is None:
        group_sizes_E = jnp.array([x_RK.shape[0]], jnp.int32)
        weights = tuple(jax.tree.map(lambda array: array[None], weight) for weight in weights)
    if activations == "int8" and not weights[0].block_size:
        raise ValueError(
            f"activations='int8' needs weights in blocks, {weights[0].format} has none"
        )
    if implementation == "mosaic":
        target, reason = require_mosaic(), _unsupported_reason(weights, activations)
        if reason is not None:
            raise NotImplementedError(reason)
        return pallas_mosaic_quantized.grouped_matmul(
            x_RK, weights[0], group_sizes_E, target=target
        )
    if _unsupported_reason(weights, activations) is None and pallas_mosaic_quantized.takes_mosaic(
        x_RK, weights[0], implementation
    ):
        return pallas_mosaic_quantized.grouped_matmul(
            x_RK, weights[0], group_sizes_E, target=current_target()
        )
    if takes_triton(implementation):
        reason = _unsupported_reason(
            weights, activations
        ) or pallas_triton_quantized.unsupported_reason(weights[0])
        if reason is None:
            return pallas_triton_quantized.grouped_matmul(
                x_RK, weights[0], group_sizes_E, target=current_target()
            )
        if implementation == "triton":
            raise NotImplementedError(reason)
    reason = cpu.unsupported_reason(x_RK, *weights)
    native_one = partial(functions["cpu"], round_x=activations == "int8")
    if implementation == "cpu":
        if reason is not None:
            raise NotImplementedError(f"the CPU kernels can't multiply this: {reason}")
        return native_one(x_RK, *weights, group_sizes_E)
    plain = functions["xla" if implementation == "auto" else implementation]

    def rounding(x_RK, *rest):
        block_size = weights[0].block_size
        x_RK = reference.round_rows(x_RK, block_size) if activations == "int8" else x_RK
        return plain(x_RK, *rest)

    if implementation == "auto" and reason is None and native.is_used_for(x_RK):
        return lax.platform_dependent(
            x_RK, *weights, group_sizes_E, cpu=native_one, default=rounding
        )
    return rounding(x_RK, *weights, group_sizes_E)


def _unsupported_reason(weights: tuple[QTensor, ...], activations: Activations) -> str | None:
    """What keeps GPU kernels from this product, in a sentence; None: nothing."""
    if len(weights) > 1:
        return "GPU kernels take gate and up as one weight: grouped_matmul.grouped_swiglu"
    if activations == "int8":
        return "GPU kernels do not round rows to int8: pass activations='float'"
    return None


def _check(x_RK: jax.Array, weights: tuple[QTensor, ...], group_sizes_E: jax.Array | None) -> None:
    first = weights[0]
    wanted = 2 if group_sizes_E is None else 3
    if x_RK.ndim != 2 or first.ndim != wanted or x_RK.shape[1] != first.shape[-2]:
        shape = "[K, N]" if group_sizes_E is None else "[E, K, N]"
        raise ValueError(f"x {x_RK.shape} must be [R, K] and w {first.shape} {shape}, the same K")
    for other in weights[1:]:
        if (other.shape, other.format, other.block_size) != (
            first.shape,
            first.format,
            first.block_size,
        ):
            raise ValueError(
                f"gate is {first.format} {first.shape} in blocks of {first.block_size}, up "
                f"{other.format} {other.shape} in blocks of {other.block_size}: they must be alike"
            )
    if group_sizes_E is not None and (
        group_sizes_E.shape != first.shape[:1]
        or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer)
    ):
        raise ValueError(
            f"group_sizes must be {first.shape[0]} integers, got {group_sizes_E.dtype} "
            f"{group_sizes_E.shape}"
        )
