"""The signature of matmul and its checks. T rows of x, K inputs, N outputs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import Activations, Implementation, grouped_matmul
from kernels.quantize import QTensor


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
    with one group.

    Args:
      x: float, its last dimensions the weight's inputs.
      weight: an array of x's dtype, or a QTensor without a stack.
      equation: as of jnp.einsum, "BLD,DHC->BLHC": letters that both operands have are the inputs;
        they stand together, before the outputs or behind them.
      activations, implementation: of a QTensor, as in `grouped_matmul`.
      fixed_order: as in `grouped_matmul`; an array then meets its kernels, too.
    Raises:
      ValueError, NotImplementedError: as in `grouped_matmul`; ValueError also for an equation that
        is none of x with one weight, or not of this QTensor's dimensions.
    """
    if not isinstance(weight, QTensor):
        if activations == "int8":
            raise ValueError(
                f"activations='int8' is for weights of few bits, w is {weight.dtype}: quantize it, "
                "or pass activations='float'"
            )
        if not fixed_order:
            return jnp.einsum(equation, x, weight)
    parts = _split(equation)
    w_1KN, outputs = _one_group(weight, parts, equation)
    leading = x.shape[: len(parts.rows)]
    x_TK = x.reshape(math.prod(leading), -1)
    num_rows = jnp.array([x_TK.shape[0]], jnp.int32)
    y_TN = grouped_matmul(
        x_TK,
        w_1KN,
        num_rows,
        activations=activations,
        fixed_order=fixed_order,
        implementation=implementation,
    )
    return y_TN.reshape(*leading, *outputs)


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
) -> tuple[jax.Array | QTensor, tuple[int, ...]]:
    """The weight as [1, K, N], and its outputs' sizes."""
    count = len(parts.outputs)
    if not isinstance(weight, QTensor):
        outputs = weight.shape[:count] if parts.outputs_first else weight.shape[-count:]
        if parts.outputs_first:
            return weight.reshape(1, math.prod(outputs), -1).swapaxes(1, 2), outputs
        return weight.reshape(1, -1, math.prod(outputs)), outputs
    num_inputs, num_outputs = weight.matrix_shape
    inputs, outputs = weight.inputs or (num_inputs,), weight.outputs or (num_outputs,)
    dims = len(weight.stack), len(inputs), len(outputs), weight.outputs_first
    if dims != (0, len(parts.inputs), count, parts.outputs_first):
        raise ValueError(
            f"{equation!r} is not of this QTensor: it stacks {weight.stack} matrices of inputs "
            f"{inputs} and outputs {outputs}{', outputs first' * weight.outputs_first}"
        )
    return jax.tree.map(lambda array: array[None], weight.as_matrices()), outputs
