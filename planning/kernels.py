"""The work of our own GPU kernels, which a program's text hides: from their names and shapes.

A kernel computes the rows that an expert really gets, and the keys that a query really sees. The
data decide both: planning takes the balanced load (planning/loops.py), and rows of one document.

B batch, L rows, H heads, C head_dim, W width of values.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import Attention
from configs.feed_forward import MoEConfig
from model.flops import visible_keys
from planning.hlo import Array, Computation, Instruction

PRODUCTS = ("grouped_matmul", "grouped_matmul_dx")
"""Each row with its expert's matrix, the last operand [E, D, F] (kernels/grouped_matmul)."""

GRADIENT = "grouped_matmul_dw"
"""The gradient of the matrices: the result, [E, D, F]."""

ATTENTION = {
    "window_attention": (1, 1),  # scores; and their sums of values
    "window_attention_dq": (2, 1),  # scores and dq; the weights' gradient
    "window_attention_dkv": (2, 2),  # scores and dk; the weights' gradient and dv
}
"""Products of the width C, and of W, that a kernel makes of each query and key it sees. Its first
three operands of four dimensions are q, k and v (kernels/window_attention).
"""


class Assumed(NamedTuple):
    """What the work of kernels depends on and the program does not say."""

    rows: float
    """That each expert gets."""
    keys: Callable[[str, int], float]
    """(where in the model, length of the rows): the keys that a query sees on average."""


def kernel_name(instruction: Instruction) -> str | None:
    """As kernels/backend.py calls it, without the prefix of Mosaic's; None for what is no kernel of
    ours. Triton's have their name in the call, Mosaic's in that of the operation.
    """
    if 'custom_call_target="__gpu$xla.gpu.triton"' in instruction.attributes:
        found = re.findall(r'\bname = "(\w+)"', instruction.attributes)
        return found[-1] if found else None
    if 'custom_call_target="mosaic_gpu' in instruction.attributes:
        found = re.findall(r"\bmosaic_(\w+)/", instruction.op_name)
        return found[-1] if found else None
    return None


def is_counted(instruction: Instruction) -> bool:
    """Whether the work of this kernel is known."""
    return kernel_name(instruction) in (*PRODUCTS, GRADIENT, *ATTENTION)


def kernel_flops(computation: Computation, instruction: Instruction, assumed: Assumed) -> float:
    """Of one run: two per row and entry of its expert's matrix, and per query, key and channel."""
    name = kernel_name(instruction)
    if name not in ATTENTION:
        return 2.0 * assumed.rows * _matrices(computation, instruction).size
    q_BLHC, _, v_BLHW = _of_four_dims(computation, instruction)[:3]
    batch, length, heads, head_dim = q_BLHC.dims
    of_keys, of_values = ATTENTION[name]
    widths = of_keys * head_dim + of_values * v_BLHW.dims[3]
    return 2.0 * batch * length * heads * assumed.keys(instruction.op_name, length) * widths


def kernel_traffic(computation: Computation, instruction: Instruction, assumed: Assumed) -> float:
    """Bytes of one run: operands read and the result written once, as if what many programs of the
    kernel read stayed on the chip. Matrices that no row needs are not read.
    """
    operands = sum(x.num_bytes for x in computation.operands(instruction))
    everything = float(operands + instruction.num_bytes)
    if kernel_name(instruction) not in PRODUCTS:
        return everything
    unread = math.exp(-assumed.rows)  # as in planning/loops.py
    return everything - unread * _matrices(computation, instruction).num_bytes


def multiplied(computation: Computation, instruction: Instruction) -> Array:
    """An operand of the kernel's products, which says in which type they are computed."""
    if kernel_name(instruction) in ATTENTION:
        return _of_four_dims(computation, instruction)[0]
    return computation.operands(instruction)[-1].arrays[0]


def mean_keys(model: ModelConfig, name: str, length: int) -> float:
    """Keys that a query of a row of one document sees on average.

    Args:
      name: where the attention is, such as "jit(step)/.../periods/layer_0/.../attention/...".
    """
    return float(visible_keys(_attention_at(model, name), np.arange(1, length + 1)).mean())


def _attention_at(model: ModelConfig, name: str) -> Attention:
    spec = _layer_at(model, name)
    if "/context/" not in name:
        return spec.attention
    assert isinstance(spec.ffn, MoEConfig)
    assert spec.ffn.router.context is not None
    return spec.ffn.router.context.attention()


def _layer_at(model: ModelConfig, name: str) -> LayerSpec:
    if "/multi_token_" in name:
        assert model.multi_token is not None
        return model.multi_token.layer
    found = re.search(r"/(layer|prefix)_(\d+)", name)
    assert found is not None, f"attention of no layer: {name}"
    layers = model.prefix if found[1] == "prefix" else model.pattern
    return layers[int(found[2]) % len(layers)]


def _matrices(computation: Computation, instruction: Instruction) -> Array:
    if kernel_name(instruction) == GRADIENT:
        return instruction.arrays[0]
    return multiplied(computation, instruction)


def _of_four_dims(computation: Computation, instruction: Instruction) -> list[Array]:
    arrays = [x.arrays[0] for x in computation.operands(instruction)]
    return [array for array in arrays if len(array.dims) == 4]
