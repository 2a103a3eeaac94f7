"""The signature of matmul and its checks. T rows of x, K inputs, N outputs."""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from kernels.backend import current_target, is_split_by_xla
from kernels.grouped_matmul.implementations import multiply, runs_native
from kernels.grouped_matmul.request import Activations, Implementation, Request
from kernels.matmul import bfloat16, few_rows
from kernels.quantize import MatrixDims, QTensor


def matmul(
    x: jax.Array,
    weight: jax.Array | QTensor,
    equation: str = "TK,KN->TN",
    *,
    activations: Activations = "auto",
    fixed_order: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns the product of all rows of x with one weight, in x's dtype.

    An array meets jnp.einsum, as it is written; a QTensor the kernels of kernels/grouped_matmul
    with one group, and so does an array in bfloat16 whose rows are float32, on a CPU. Many rows in
    bfloat16 meet an array in bfloat16 or float32 by the kernels of bfloat16.py where a CPU has them
    and they are faster; the gradient of a float32 weight then is the sums themselves. A few rows in
    float32 meet a large array by the kernel of few_rows.py.

    Args:
      x: float, its last dimensions the weight's inputs.
      weight: an array of x's dtype, which another float becomes, or in bfloat16 as it is; or a
        QTensor without a stack.
      equation: as of jnp.einsum, "BLD,DHC->BLHC": letters that both operands have are the inputs;
        they stand together, before the outputs or behind them.
      activations, implementation: where kernels multiply, as in `grouped_matmul`.
      fixed_order: as in `grouped_matmul`; an array of x's dtype then meets its kernels, too.
    Raises:
      ValueError, NotImplementedError: as in `grouped_matmul`; ValueError also for an equation that
        is none of x with one weight, or not of this QTensor's dimensions.
    """
    target = current_target()
    if not isinstance(weight, QTensor):
        if activations == "int8":
            raise ValueError(
                f"activations='int8' is for weights of few bits, w is {weight.dtype}: quantize it, "
                "or pass activations='float'"
            )
        is_named = implementation == "cpu" and x.dtype != weight.dtype
        is_auto = implementation == "auto" and reads_as_stored(weight.dtype, x.dtype)
        if not (fixed_order or is_named or is_auto):
            if implementation == "auto" and takes_rows(x, weight, equation):
                return _multiply_rows(x, weight, equation)
            return jnp.einsum(equation, x, weight.astype(x.dtype))
    parts = _split(equation)
    matrix, inputs, outputs = _one_group(weight, parts, equation)
    leading = x.shape[: len(parts.rows)]
    if x.shape[len(leading) :] != inputs:
        raise ValueError(f"x {x.shape} must end in the inputs {inputs} of {equation!r}")
    x_TK = x.reshape(math.prod(leading), -1)
    y_TN = multiply(
        Request(
            x_TK=x_TK,
            weight=matrix,
            outputs_first=parts.outputs_first and not isinstance(weight, QTensor),
            group_sizes_E=jnp.array([x_TK.shape[0]], jnp.int32),
            activations=activations,
            fixed_order=fixed_order,
            implementation=implementation,
            target=target,
        )
    )
    return y_TN.reshape(*leading, *outputs)


def reads_as_stored(weight_dtype: jnp.dtype, dtype: jnp.dtype) -> bool:
    """Whether rows of the dtype meet an array of the other as it lies in memory, and no copy of it
    in theirs: float32 and bfloat16 on one CPU, by its native kernels.
    """
    is_mixed = dtype == jnp.float32 and weight_dtype == jnp.bfloat16
    return is_mixed and runs_native(current_target()) and not is_split_by_xla()


def takes_rows(x: jax.Array, weight: jax.Array | QTensor, equation: str) -> bool:
    """Whether the kernels of bfloat16.py or few_rows.py multiply x by an array, as the equation of
    rows with one weight has it; those of bfloat16.py need inputs that come first.
    """
    if isinstance(weight, QTensor) or x.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    parts = _split(equation)
    num_rows = math.prod(x.shape[: len(parts.rows)])
    if x.dtype == jnp.float32:
        return few_rows.is_native(num_rows, x.dtype, weight)
    return not parts.outputs_first and bfloat16.is_native(num_rows, x.dtype)


def _multiply_rows(x: jax.Array, weight: jax.Array, equation: str) -> jax.Array:
    parts = _split(equation)
    x_TK = x.reshape(-1, math.prod(x.shape[len(parts.rows) :]))
    num_inputs = x_TK.shape[1]
    if parts.outputs_first:
        outputs = weight.shape[: len(parts.outputs)]
        y_TN = few_rows.product(x_TK, weight.reshape(-1, num_inputs), True)
    else:
        outputs, w_KN = weight.shape[len(parts.inputs) :], weight.reshape(num_inputs, -1)
        is_half = x.dtype == jnp.bfloat16
        multiply = bfloat16.product if is_half else few_rows.product
        y_TN = multiply(x_TK, w_KN, x.dtype if is_half else False)
    return cast(jax.Array, y_TN).reshape(*x.shape[: len(parts.rows)], *outputs)


class _Parts(NamedTuple):
    """Letters of an equation."""

    rows: str
    inputs: str
    outputs: str
    outputs_first: bool


def _split(equation: str) -> _Parts:
    operands, _, result = equation.partition("->")
    of_x, _, of_weight = operands.partition(",")
    inputs = "".join(letter for letter in of_weight if letter in of_x)
    outputs = "".join(letter for letter in of_weight if letter not in of_x)
    rows = of_x.removesuffix(inputs)
    outputs_first = of_weight == outputs + inputs
    is_known = outputs_first or of_weight == inputs + outputs
    if not (inputs and outputs and is_known and of_x == rows + inputs and result == rows + outputs):
        raise ValueError(
            f"{equation!r} is no product of rows with one weight: it must be like "
            "'BLD,DHC->BLHC', the inputs last in x and together in the weight"
        )
    return _Parts(rows, inputs, outputs, outputs_first)


def _one_group(
    weight: jax.Array | QTensor, parts: _Parts, equation: str
) -> tuple[jax.Array | QTensor, tuple[int, ...], tuple[int, ...]]:
    """The weight as a stack of one matrix, and the sizes of its inputs and outputs."""
    count = len(parts.outputs)
    if not isinstance(weight, QTensor):
        dims = MatrixDims(len(parts.inputs), count, parts.outputs_first)
        _, inputs, outputs = dims.split(weight.shape)
        sides = math.prod(inputs), math.prod(outputs)
        return weight.reshape(1, *sides[:: -1 if parts.outputs_first else 1]), inputs, outputs
    num_inputs, num_outputs = weight.matrix_shape
    inputs, outputs = weight.inputs or (num_inputs,), weight.outputs or (num_outputs,)
    found = len(weight.stack), len(inputs), len(outputs), weight.outputs_first
    if found != (0, len(parts.inputs), count, parts.outputs_first):
        raise ValueError(
            f"{equation!r} is not of this QTensor: it stacks {weight.stack} matrices of inputs "
            f"{inputs} and outputs {outputs}{', outputs first' * weight.outputs_first}"
        )
    one = jax.tree.map(lambda array: array[None], weight.as_matrices())
    return one, inputs, outputs
