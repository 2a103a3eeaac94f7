"""Weights rounded while a model learns, so that it learns to do with them (QAT).

The loss is that of the rounded weights, and its gradient moves the float masters as if rounding
were the identity (straight-through, Bengio et al. 2013).
"""

import math
from typing import Any

import jax
from jax.tree_util import keystr, tree_map_with_path

from configs.base import RunConfig
from configs.tuning import QuantizationAwareConfig
from kernels.quantize import QUANTIZED, MatrixDims, dequantize, quantize
from model.transformer import VOCABULARY, Transformer, weight_dims


def first_step(run: RunConfig, config: QuantizationAwareConfig) -> int:
    """The step from which the weights are rounded."""
    return run.steps - max(round(config.last_fraction * run.steps), 1)


def rounded_params(run: RunConfig, model: Transformer, params: Any, step: jax.Array) -> Any:
    """What the loss of a step is taken with: the masters, from `first_step` on rounded."""
    config = run.quantization_aware
    if config.weights == "none":
        return params
    return jax.lax.cond(
        step >= first_step(run, config), lambda p: round_all(config, model, p), lambda p: p, params
    )


def round_all(config: QuantizationAwareConfig, model: Transformer, params: Any) -> Any:
    """Each weight that may have few bits and whose inputs the blocks divide, rounded to nearest;
    embeddings and output layer to int8 where the others are int4.
    """

    def rounded(path: Any, w: jax.Array, dims: MatrixDims | None) -> jax.Array:
        assert config.weights != "none"
        if dims is None or math.prod(dims.split(w.shape)[1]) % config.block_size:
            return w
        is_end = keystr(path, simple=True, separator=".") in VOCABULARY
        weights = "int8" if is_end and config.weights == "int4" else config.weights
        size, scales = config.block_size, "bfloat16"
        held = quantize(w, QUANTIZED[weights], dims=dims, block_size=size, scale_dtype=scales)
        return dequantize(held).astype(w.dtype)

    dims = weight_dims(model)
    return tree_map_with_path(
        rounded, params, dims, is_leaf=lambda x: x is None or isinstance(x, MatrixDims)
    )
