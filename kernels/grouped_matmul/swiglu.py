"""The first half of a routed expert, silu(gate) * up, as one op: where a kernel fuses it.

T tokens, R rows sorted by group, E groups (experts), D input width, F output width.
"""

import jax

from kernels.backend import current_target, require_mosaic, takes_triton
from kernels.grouped_matmul import (
    pallas_mosaic_quantized,
    pallas_triton,
    pallas_triton_quantized,
)
from kernels.grouped_matmul.api import Implementation, grouped_matmul, mosaic_is_faster
from kernels.grouped_matmul.pallas_mosaic_quantized import takes_mosaic
from kernels.quantize import QTensor, dequantize


def grouped_swiglu(
    x_TD: jax.Array,
    w_gate_up_ED2F: jax.Array | QTensor,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns silu(gate[r]) * up[r], [R, F] in x's dtype: the halves of x[rows[r]] @ w[group of r].

    Rows past the last group are unspecified but finite, as in `grouped_matmul`.

    Args:
      x_TD: float [T, D].
      w_gate_up_ED2F: [E, D, 2 F], an array or a QTensor: the gate's columns before those of up.
      group_sizes_E: int32 [E], of sorted rows, summing to at most R.
      rows_R: int32 in [0, T): the row of x that each sorted row is. None: x is sorted, and R is T.
      implementation: as in `grouped_matmul`. "triton" gathers the rows in the kernel, and gate and
        up never leave it; nor do they leave "mosaic", for a QTensor on Hopper alone.
    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: "triton" or "mosaic" without a GPU that runs it, or for a QTensor that
        it can't read; "mosaic" for an array.
    """
    is_quantized = isinstance(w_gate_up_ED2F, QTensor)
    if implementation == "mosaic":
        target = require_mosaic()
        if not is_quantized:
            raise NotImplementedError(
                "the Mosaic kernel multiplies quantized weights: pass a QTensor, or take 'triton'"
            )
        return pallas_mosaic_quantized.grouped_matmul(
            x_TD, w_gate_up_ED2F, group_sizes_E, rows_R=rows_R, gated=True, target=target
        )
    if is_quantized and takes_mosaic(x_TD, w_gate_up_ED2F, implementation, gated=True):
        return pallas_mosaic_quantized.grouped_matmul(
            x_TD, w_gate_up_ED2F, group_sizes_E, rows_R=rows_R, gated=True, target=current_target()
        )
    if is_quantized:
        is_fused = pallas_triton_quantized.unsupported_reason(w_gate_up_ED2F) is None
    else:  # the faster product makes up for gate and up that are written out
        num_rows = x_TD.shape[0] if rows_R is None else rows_R.shape[0]
        is_fused = not mosaic_is_faster(x_TD, w_gate_up_ED2F, num_rows)
    if takes_triton(implementation) and (is_fused or implementation == "triton"):
        target = current_target()
        if is_quantized:
            return pallas_triton_quantized.grouped_matmul(
                x_TD, w_gate_up_ED2F, group_sizes_E, rows_R=rows_R, gated=True, target=target
            )
        return pallas_triton.grouped_swiglu(
            x_TD, w_gate_up_ED2F, group_sizes_E, rows_R=rows_R, target=target
        )
    x_RD = x_TD if rows_R is None else x_TD[rows_R]
    if is_quantized:
        w_gate_up_ED2F = jax.lax.stop_gradient(dequantize(w_gate_up_ED2F, x_RD.dtype.name))
    h_R2F = grouped_matmul(x_RD, w_gate_up_ED2F, group_sizes_E, implementation=implementation)
    return pallas_triton.swiglu_of_halves(h_R2F)
