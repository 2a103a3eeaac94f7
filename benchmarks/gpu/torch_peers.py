"""PyTorch's kernels on the operands of a case: grouped_mm and scaled_dot_product_attention.

Arrays are shared with JAX, not copied. Where torch is missing, or has no GPU, there are no peers.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu.operands import Operands
from benchmarks.gpu.roofline import Case
from kernels.grouped_matmul.cases import CompiledCase as GroupedCase
from kernels.window_attention.cases import CompiledCase as WindowCase

GROUPED, ATTENTION = "torch grouped_mm", "torch scaled_dot_product_attention"


def available() -> Any | None:
    """The torch module, where it has a GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    return torch if torch.cuda.is_available() else None


def peers(torch: Any, case: Case, operands: Operands) -> dict[str, Callable[[], Any]]:
    """Calls by name that queue the useful work of a case once."""
    if isinstance(case, GroupedCase):
        return _grouped(torch, case, operands)
    if isinstance(case, WindowCase):
        return _attention(torch, case, operands)
    return {}


def _grouped(torch: Any, case: GroupedCase, operands: Operands) -> dict[str, Callable[[], Any]]:
    x, weight, sizes, rows, *dy = operands
    if case.format != "bf16":
        return {}
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    give = torch.from_dlpack
    x = give(x if rows is None else x[rows])
    ends = give(jnp.cumsum(sizes).astype(jnp.int32))
    if case.contraction == "gradient_w":
        x_t, dy = x.transpose(0, 1), give(dy[0])
        return {GROUPED: lambda: product(x_t, dy, offs=ends)}
    weight = give(weight)
    if case.contraction == "gradient_x":
        dy, w_t = give(dy[0]), weight.transpose(1, 2)
        return {GROUPED: lambda: product(dy, w_t, offs=ends)}
    assert case.contraction == "forward"
    if not case.gated:
        return {GROUPED: lambda: product(x, weight, offs=ends)}

    def gated() -> Any:
        gate, up = product(x, weight, offs=ends).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    return {GROUPED + ", silu and mul": gated}


def _attention(torch: Any, case: WindowCase, operands: Operands) -> dict[str, Callable[[], Any]]:
    if case.window_size is not None or case.sink_logits or case.dtype != "bfloat16":
        return {}
    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in operands[:3])
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        return attend(q, k, v, is_causal=True, enable_gqa=True)

    if case.kernel == "forward":
        return {ATTENTION: forward}
    dout = torch.from_dlpack(operands[6]).transpose(1, 2)
    wanted = {"gradient_q": [q], "gradient_kv": [k, v]}[case.kernel]
    for x in wanted:
        x.requires_grad_(True)
    return {ATTENTION: lambda: torch.autograd.grad(forward(), wanted, dout)}
