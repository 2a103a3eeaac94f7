"""Floating-point operations of a traced function, loops multiplied by their trip counts.

XLA's own cost analysis counts the body of a loop once, so it can't be used for models that scan.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

FREE = {
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "slice",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "concatenate",
    "pad",
    "squeeze",
    "convert_element_type",
    "iota",
    "copy",
    "stop_gradient",
    "rev",
    "split",
    "select_n",
}
"""Primitives that move numbers or choose between them."""


def count_flops(function: Callable, *arguments: Any) -> float:
    """Two per multiply-add of a matrix product, one per entry of any other arithmetic.

    Args:
      arguments: arrays or ShapeDtypeStructs; nothing is computed.
    Raises:
      NotImplementedError: a while loop, whose trip count a trace does not know.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        shape = equation.invars[0].aval.shape
        size = math.prod(equation.outvars[0].aval.shape)
        return 2.0 * size * math.prod(shape[i] for i in contracted)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name == "while":
        raise NotImplementedError("a while loop's trip count is not in its trace")
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None:
        return _count(getattr(inner, "jaxpr", inner))
    if name in FREE:
        return 0.0
    arrays = equation.invars if name.startswith("reduce") else equation.outvars
    return float(max((math.prod(x.aval.shape) for x in arrays), default=0))
