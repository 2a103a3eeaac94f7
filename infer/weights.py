"""Formats of weights in memory: which weights of a model have few bits, and how they get them.

A weight's format is chosen when a model is loaded, and every product with it follows
(model/layers.py: project). Norms, biases, routers and small weights stay in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.checks import require
from kernels.backend import Target, current_target
from kernels.quantize import Format, MatrixDims, QTensor, dequantize
from kernels.quantize.formats import (
    FOUR_BITS,
    QUANTIZED,
    WeightFormat,
    choose_block_size,
    quantizable_reason,
    rounds_in_place,
    to_format,
)
from model.transformer import VOCABULARY, Transformer, abstract_variables, weight_dims
from parallel.mesh import TENSOR

FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

SMALLEST = 4096
"""Weights of a matrix below which it stays in float32: a call costs more than its bytes."""

LARGEST_PIECE = 2**24
"""Weights that are rounded at a time: the temporaries of rounding are a few times as large."""

Convert = Callable[[Any, jax.Array], Any]
"""(path of a variable, the variable) to what the model holds in its place."""


def check_format(weights: str) -> WeightFormat:
    """
    Raises:
      UserError: no such format.
    """
    require(weights in FORMATS, f"weights={weights} must be one of {', '.join(FORMATS)}")
    return cast(WeightFormat, weights)


def formats_of(
    model: Transformer, weights: WeightFormat, target: Target | None = None
) -> dict[str, WeightFormat]:
    """The format of each parameter that does not stay in float32, by the parameter's path.

    What four bits would cost most is kept in int8: embeddings and output layer, as in llama.cpp's
    files.

    Args:
      target: the device that multiplies; None is the default one.
    """
    target = target or current_target()
    chosen: dict[str, WeightFormat] = {}
    for path, (shape, dims) in matrices_of(model).items():
        format = "int8" if weights in FOUR_BITS and _is_vocabulary(path) else weights
        if weights == "float32" or math.prod(shape[-_num_dims(dims) :]) < SMALLEST:
            continue
        if format in QUANTIZED:
            reason = quantizable_reason(shape, QUANTIZED[format], target, dims=dims)
            if reason is not None:
                continue
        chosen[path] = format
    return chosen


def converter(model: Transformer, weights: WeightFormat) -> Convert:
    """What brings each variable, one at a time, into its format."""
    formats, matrices = formats_of(model, weights), matrices_of(model)

    def convert(path: Any, x: jax.Array) -> Any:
        name = jax.tree_util.keystr(path[1:])
        if path[0].key != "params" or name not in formats:
            return x
        return _in_format(x, formats[name], matrices[name][1])

    return convert


def sharding_for(
    model: Transformer, weights: WeightFormat, mesh: Mesh
) -> Callable[[Any, NamedSharding], NamedSharding]:
    """The sharding of each variable as its format can be split. One of few bits is split by what
    stacks matrices (layers, experts), and along the axis "tensor" where that cuts through no block:
    see `_in_format`.
    """
    formats, matrices = formats_of(model, weights), matrices_of(model)

    def sharding(path: Any, given: NamedSharding) -> NamedSharding:
        name = jax.tree_util.keystr(path[1:])
        if path[0].key != "params" or formats.get(name) not in QUANTIZED:
            return given
        shape, dims = matrices[name]
        num_stack = len(shape) - _num_dims(dims)
        spec = list(given.spec[:num_stack])
        split = _tensor_dim(given.spec, num_stack)
        if split is not None and not _is_vocabulary(name):
            size = shape[split] // mesh.shape[TENSOR]
            part = (*shape[:split], size, *shape[split + 1 :])
            if _same_blocks(shape, part, QUANTIZED[formats[name]], dims):
                spec += [None] * (split - len(spec)) + [TENSOR]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding


def _same_blocks(
    shape: tuple[int, ...], part: tuple[int, ...], format: Format, dims: MatrixDims
) -> bool:
    """Whether a part of a weight, rounded by itself, has the same values as in the whole."""
    target = current_target()
    if quantizable_reason(part, format, target, dims=dims) is not None:
        return False
    inputs = [math.prod(dims.split(of)[1]) for of in (shape, part)]
    whole, own = (choose_block_size(count, format, target) for count in inputs)
    return whole == own


def _tensor_dim(spec: PartitionSpec, num_stack: int) -> int | None:
    """The dim of the matrix that is split along the axis "tensor"."""
    found = [dim for dim, axis in enumerate(spec) if axis == TENSOR and dim >= num_stack]
    return found[0] if found else None


def _is_vocabulary(name: str) -> bool:
    """Whether it has a row for each token of the vocabulary."""
    return name[2:-2].replace("']['", ".") in VOCABULARY


def num_bytes(variables: Any) -> int:
    """Of all arrays, on one device where they are not split."""
    return sum(x.nbytes for x in jax.tree.leaves(variables))


def _num_dims(dims: MatrixDims) -> int:
    return dims.inputs + dims.outputs


def matrices_of(model: Transformer) -> dict[str, tuple[tuple[int, ...], MatrixDims]]:
    """Shape and dims of each weight that may have few bits, by its path."""
    abstract, _ = abstract_variables(model)
    dims = jax.tree.leaves_with_path(
        weight_dims(model), is_leaf=lambda x: isinstance(x, MatrixDims)
    )
    by_path = {jax.tree_util.keystr(path): found for path, found in dims}
    leaves = jax.tree.leaves_with_path(abstract["params"])
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in leaves}
    return {path: (shapes[path], found) for path, found in by_path.items()}


def _in_format(x: jax.Array, format: WeightFormat, dims: MatrixDims) -> jax.Array | QTensor:
    """x in its format; each device rounds what it holds. Where that is parts of matrices, along the
    axis "tensor", the parts are a stacked dimension behind the others (model.layers.SplitWeight).
    """
    if format not in QUANTIZED or len(x.sharding.device_set) == 1:
        return _rounded(x, format, dims)
    assert isinstance(x.sharding, NamedSharding)
    num_stack, spec, mesh = x.ndim - _num_dims(dims), x.sharding.spec, x.sharding.mesh
    stack, axes = x.shape[:num_stack], [*spec, *[None] * x.ndim][:num_stack]
    is_split = _tensor_dim(spec, num_stack) is not None
    if is_split:
        stack, axes = (*stack, mesh.shape[TENSOR]), [*axes, TENSOR]
    made: dict[Any, QTensor] = {}
    shards: list[QTensor] = []
    for shard in x.addressable_shards:
        index = tuple((part.start, part.stop) for part in shard.index)
        if index not in made:
            part = cast(QTensor, _rounded(shard.data, format, dims))
            made[index] = _as_one_part(part, num_stack) if is_split else part
        shards.append(jax.device_put(made[index], shard.device))

    def together(*parts: jax.Array) -> jax.Array:
        shape = (*stack, *parts[0].shape[len(stack) :])
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree.map(together, *shards)


@functools.partial(jax.jit, static_argnums=1)
def _as_one_part(x: QTensor, dim: int) -> QTensor:
    """With a stacked dimension of one there, in one program for all its arrays."""
    return jax.tree.map(lambda part: jnp.expand_dims(part, dim), x)


def _rounded(x: jax.Array, format: WeightFormat, dims: MatrixDims) -> jax.Array | QTensor:
    """One device's x in its format; where rounding takes temporaries, a large one is cut along its
    first dim and rounded piece by piece, if it may be cut there.
    """
    num_stack, target = x.ndim - _num_dims(dims), current_target()
    needs_room = format in QUANTIZED and not rounds_in_place(QUANTIZED[format], target)
    if not needs_room or x.size <= LARGEST_PIECE or not (num_stack or dims.outputs_first):
        return _convert(format, dims, x)
    rows = max(LARGEST_PIECE // max(x.size // len(x), 1), 1)
    if num_stack == 0:
        rows = max(rows // 256, 1) * 256  # what the packings put side by side
    pieces = [_convert(format, dims, x[i : i + rows]) for i in range(0, len(x), rows)]
    if num_stack > 0:
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    return _beside(pieces)


def _beside(pieces: list[Any]) -> QTensor:
    """Matrices of some outputs each as one of all."""
    values = jnp.concatenate([p.values for p in pieces], axis=0)
    scales = jnp.concatenate([p.scales for p in pieces], axis=1)
    offsets = None
    if pieces[0].offsets is not None:
        offsets = jnp.concatenate([p.offsets for p in pieces], axis=1)
    outputs = (sum(p.outputs[0] for p in pieces), *pieces[0].outputs[1:])
    return dataclasses.replace(
        pieces[0], values=values, scales=scales, offsets=offsets, outputs=outputs
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _convert(format: WeightFormat, dims: MatrixDims, x: jax.Array) -> jax.Array | QTensor:
    return to_format(x, format, current_target(), dims=dims)


def converted(variables: Any, convert: Convert) -> Any:
    """Variables in their formats; those that are given lose each array as it is converted."""

    def walk(tree: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(tree, dict):
            return jax.tree_util.tree_map_with_path(
                lambda rest, x: convert((*path, *rest), x), tree
            )
        return {
            name: walk(tree.pop(name), (*path, jax.tree_util.DictKey(name))) for name in list(tree)
        }

    return walk(variables, ())


def as_array(x: Any) -> np.ndarray | jax.Array:
    """A weight in floats, whatever its format."""
    return dequantize(x) if isinstance(x, QTensor) else x
