"""The signatures of grouped_matmul and grouped_swiglu, and their checks.

T rows of x, R rows sorted by group, E groups (experts), D input width, F output width.
"""

import jax
import jax.numpy as jnp

from kernels.backend import current_target
from kernels.grouped_matmul.implementations import multiply
from kernels.grouped_matmul.request import Activations, Implementation, Request
from kernels.quantize import QTensor


def grouped_matmul(
    x_RD: jax.Array,
    weight: jax.Array | QTensor,
    group_sizes_E: jax.Array,
    *,
    activations: Activations = "auto",
    fixed_order: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns y[r] = x[r] @ w[group of r], [R, F] in x's dtype, with sums in float32.

    Group e owns the group_sizes[e] rows after those of the groups before it. Rows past the last
    group are unspecified but finite for finite input: mask them, and their cotangents must be 0.

    Args:
      x_RD: float [R, D], rows sorted by group.
      weight: [E, D, F]: an array of x's dtype, or in bfloat16 for float32 rows; or a QTensor
        (kernels/quantize), whose dimensions of inputs and of outputs count as one each. Kernels
        read weights as they are stored.
      group_sizes_E: int32 [E], each >= 0, summing to at most R.
      activations: what the CPU's product with a weight of fewer bits makes of x. "float" keeps
        it; "int8" rounds it to 8 bits with a scale per row and block of inputs, as llama.cpp does;
        "auto" takes what is fastest and shows little beside the weights' rounding: 16 bits so for
        int8 weights (in blocks of more than 512 inputs "float"), 8 bits for int4, x as it is for
        others; and for many rows of a group on average, where the processor has tiles of it (AMX),
        bfloat16, two parts of it for int8 weights. A row's bits depend on how many rows there are,
        not on their groups, and not on them either in 8 or 16 bits. GPU kernels take x as it is.
      fixed_order: a row's result has the same bits whatever other rows there are, and wherever it
        stands among them, on one machine: for a request that must not depend on its batch. "auto"
        then takes no tiles. Slower for many rows of "float", and with tiles of "auto".
      implementation: "reference" multiplies every row with every matrix; "xla" does only the work
        that the groups ask for; both make floats of a QTensor. "cpu" is C++ (built with the
        installation), for arrays in float32 and bfloat16 and for int8 and int4 packed as "panels";
        "triton" is a GPU kernel, whose int4 are packed as "split_128"; "mosaic" is one for Hopper
        alone (bfloat16 rows; arrays D and F multiples of 64, with w's gradient of "triton";
        QTensors in "canonical" order). "auto" takes the first that can and that was measured to be
        the faster (kernels/backend.py, kernels/native/measured.py): "mosaic", "triton", "cpu", and
        for arrays "xla". For a QTensor it takes "xla" only where none of the kernels runs.
    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the implementation asked for can't do this here; "auto", too, for a
        QTensor that the kernels here can't read: kernels.quantize.repack(weight,
        preferred_packing(format, target)).
    Numerics: of float32 arrays within 1e-5 relative of the reference (the order of sums differs).
      Of others |error| <= sum over k of |w[k]| * d[k], w without its offset, beside float32's own.
      d[k] is 1/254 of its block's largest |x| with "int8"; with "float" 2^-23 of that, or in tiles
      2^-14 |x[k]|; with "auto" 1/65534 of it for int8 weights, in tiles as with "float"; for others
      as with "int8" or "float", or in tiles 2^-7 |x[k]|. (Of normal x in blocks of 32 the mean
      error is 0.54% of x's with "int8"; with "auto" 0.0021% in 16 bits and 0.23% in tiles; 0.0004%
      with "float".) A row that is not finite has results that are not.
    """
    request = Request(
        x_TK=x_RD,
        weight=_as_matrices(weight),
        group_sizes_E=group_sizes_E,
        activations=activations,
        fixed_order=fixed_order,
        implementation=implementation,
        target=current_target(),
    )
    _check(request)
    return multiply(request)


def grouped_swiglu(
    x_TD: jax.Array,
    weight: jax.Array | QTensor,
    group_sizes_E: jax.Array,
    *,
    rows_R: jax.Array | None = None,
    activations: Activations = "auto",
    fixed_order: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns silu(gate[r]) * up[r], [R, F] in x's dtype: the halves of x[rows[r]] @ w[group of r].

    The first half of a routed expert, as one op where a kernel fuses it: "triton" gathers the rows
    in the kernel, and gate and up never leave it; nor do they leave "mosaic" and "cpu" for a
    QTensor. Rows past the last group are unspecified but finite, as in `grouped_matmul`.

    Args:
      x_TD: float [T, D].
      weight: gate's and up's, [E, D, 2, F] or [E, D, 2 F]: the gate's columns before those of up.
      group_sizes_E: int32 [E], of sorted rows, summing to at most R.
      rows_R: int32 in [0, T): the row of x that each sorted row is. None: x is sorted, and R is T.
      Others as in `grouped_matmul`.
    Raises:
      As `grouped_matmul`; also "mosaic" for an array.
    """
    request = Request(
        x_TK=x_TD,
        weight=_as_matrices(weight),
        group_sizes_E=group_sizes_E,
        rows_R=rows_R,
        gated=True,
        activations=activations,
        fixed_order=fixed_order,
        implementation=implementation,
        target=current_target(),
    )
    _check(request)
    return multiply(request)


def _as_matrices(weight: jax.Array | QTensor) -> jax.Array | QTensor:
    """[E, D, F] of a QTensor of any shape, or of an array whose gate and up are a dimension."""
    if isinstance(weight, QTensor):
        return weight.as_matrices()
    if weight.ndim == 4:
        return weight.reshape(*weight.shape[:2], -1)
    return weight


def _check(request: Request) -> None:
    x, weight, sizes_E = request.x_TK, request.weight, request.group_sizes_E
    rows, groups = x.shape, weight.shape
    if x.ndim != 2 or weight.ndim != 3 or rows[1] != groups[1]:
        raise ValueError(f"x {rows} must be [R, D] and w {groups} [E, D, F] with the same D")
    if request.gated and groups[2] % 2:
        raise ValueError(f"w {groups} must hold as many columns of the gate as of up")
    if sizes_E.shape != groups[:1]:
        raise ValueError(
            f"group_sizes {sizes_E.shape} must have one entry per matrix of w {groups}"
        )
    if not jnp.issubdtype(sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {sizes_E.dtype}")
    if not isinstance(weight, QTensor):
        is_mixed = x.dtype == jnp.float32 and weight.dtype == jnp.bfloat16
        if x.dtype != weight.dtype and not is_mixed:
            raise ValueError(f"x is {x.dtype}, w is {weight.dtype}: cast one to the other's dtype")
        if request.activations == "int8":
            raise ValueError(
                f"activations='int8' is for weights of few bits, w is {weight.dtype}: quantize it, "
                "or pass activations='float'"
            )
