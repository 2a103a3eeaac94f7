"""The work of our own GPU kernels, which a program's text hides: from their names and shapes.

A kernel computes only the rows that an expert really gets, which the data decide: planning takes
the balanced load (planning/loops.py).
"""

import math
import re

from planning.hlo import Array, Computation, Instruction

PRODUCTS = ("grouped_matmul", "grouped_matmul_dx")
"""Each row with its expert's matrix, the last operand [E, D, F] (kernels/grouped_matmul)."""

GRADIENT = "grouped_matmul_dw"
"""The gradient of the matrices: the result, [E, D, F]."""


def kernel_name(instruction: Instruction) -> str | None:
    """As kernels/backend.py calls it; None for anything but a kernel of Triton's."""
    if 'custom_call_target="__gpu$xla.gpu.triton"' not in instruction.attributes:
        return None
    found = re.findall(r'\bname = "(\w+)"', instruction.attributes)
    return found[-1] if found else None


def is_counted(instruction: Instruction) -> bool:
    """Whether the work of this kernel is known."""
    return kernel_name(instruction) in (*PRODUCTS, GRADIENT)


def kernel_flops(computation: Computation, instruction: Instruction, rows: float) -> float:
    """Of one run: two per row and entry of its expert's matrix.

    Args:
      rows: that each expert gets.
    """
    return 2.0 * rows * _matrices(computation, instruction).size


def kernel_traffic(computation: Computation, instruction: Instruction, rows: float) -> float:
    """Bytes of one run: operands read and the result written once, as if each block of rows met a
    matrix that is still on the chip. Matrices that no row needs are not read.
    """
    operands = sum(x.num_bytes for x in computation.operands(instruction))
    everything = operands + instruction.num_bytes
    if kernel_name(instruction) == GRADIENT:
        return float(everything)
    unread = math.exp(-rows)  # as in planning/loops.py
    return everything - unread * _matrices(computation, instruction).num_bytes


def multiplied(computation: Computation, instruction: Instruction) -> Array:
    """An operand of the kernel's products, which says in which type they are computed."""
    return computation.operands(instruction)[-1].arrays[0]


def _matrices(computation: Computation, instruction: Instruction) -> Array:
    if kernel_name(instruction) == GRADIENT:
        return instruction.arrays[0]
    return multiplied(computation, instruction)
