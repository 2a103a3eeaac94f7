"""Rounding of a model's weights, layer by layer: each layer reads what the rounded ones before it
give.

N outputs, K inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from checkpoint.rounded import RoundedParameter
from compress.folding import best_factor, places, rotated, scale_inputs, smoothing
from compress.gptq import PreparedInputs, gptq, prepare, row_losses
from compress.grids import Grid, as_parameter, decoded, matrices, round_to_nearest
from compress.importance import Progress
from compress.inputs import Inputs, grams_of, read_inputs
from compress.layered import Layer, LayeredModel, Tree, embed, ends_model, run_layer
from compress.working_folder import load_arrays, save_arrays
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import require
from kernels.quantize import MatrixDims
from model.step import Step
from model.transformer import Transformer, weight_dims

Method = Literal["rtn", "gptq", "awq", "smoothquant", "rotate"]
Assignment = Mapping[str, Grid]
"""The grid of each weight that is rounded, by its path: "3.attention.q", "embedding", "output"."""
ROUNDINGS = ("rtn", "gptq")
SMOOTH_EXPONENT = 0.5


def parsed_methods(text: str) -> tuple[Method, ...]:
    """Methods that go together, as "rotate,gptq".

    Raises:
      UserError: an unknown one, or two that exclude each other.
    """
    methods: Any = tuple(text.split(","))
    known = get_args(Method)
    require(set(methods) <= set(known), f"method {text!r} must be of {', '.join(known)}")
    require(len(set(methods)) == len(methods), f"method {text!r} names one twice")
    for pair in (ROUNDINGS, ("awq", "smoothquant")):
        require(not set(pair) <= set(methods), f"method {text!r}: take one of {' and '.join(pair)}")
    return methods


def layer_dims(config: ModelConfig, spec: LayerSpec) -> dict[str, MatrixDims]:
    """The dims of each weight of a layer that may have few bits, by its path in the layer."""
    return dict(_layer_dims(dataclasses.replace(
        config, num_layers=1, prefix=(), pattern=(spec,), early_exit=None, multi_token=None,
        exit_spacing=None,
    )))  # fmt: skip


@lru_cache(maxsize=64)
def _layer_dims(config: ModelConfig) -> tuple[tuple[str, MatrixDims], ...]:
    tree = weight_dims(Transformer(config))["periods"]["layer_0"]
    found = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, MatrixDims))
    paths = [(jax.tree_util.keystr(p, simple=True, separator="."), dims) for p, dims in found]
    return tuple((path, dims) for path, dims in paths if isinstance(dims, MatrixDims))


END_DIMS = {"embedding": MatrixDims(1, 1, outputs_first=True), "output": MatrixDims(1, 1)}


def leaf(params: Tree, path: str) -> Any:
    """What lies at a path of a layer's weights."""
    for name in path.split("."):
        params = params[name]
    return params


def with_leaf(params: Tree, path: str, value: Any) -> Tree:
    """The weights with another one at a path."""
    name, _, rest = path.partition(".")
    return params | {name: with_leaf(params[name], rest, value) if rest else value}


def in_floats(model: LayeredModel) -> LayeredModel:
    """The model with the values of its rounded weights."""
    layers = tuple(dataclasses.replace(x, params=_floats(x.params)) for x in model.layers)
    return dataclasses.replace(model, layers=layers, ends=_floats(model.ends))


def _floats(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.values() if isinstance(x, RoundedParameter) else x, tree)


def prepared(model: LayeredModel, methods: Sequence[Method]) -> LayeredModel:
    """The same function in the form that is rounded.

    Raises:
      UserError: a model that can't be turned.
    """
    return rotated(model) if "rotate" in methods else model


def round_model(
    model: LayeredModel,
    assignment: Assignment,
    methods: Sequence[Method],
    steps: Sequence[Step],
    *,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
    notes: Callable[[str], None] = lambda _: None,
) -> LayeredModel:
    """The model with RoundedParameters in the place of the weights that have a grid.

    Args:
      model: of `prepared`.
      steps: of the calibration text; read by gptq, awq and smoothquant alone.
      folder: where layers are kept that are done, and found.
      notes: is told which weights were rounded to the nearest for want of their inputs.
    """
    reads = bool({"gptq", "awq", "smoothquant"} & set(methods))
    ends = ends_model(model)
    xs = [embed(ends, model.ends, step.tokens_BL) for step in steps] if reads else []
    rounded: list[Layer] = []
    unseen: set[str] = set()
    for i, layer in enumerate(model.layers):
        own = {path.partition(".")[2]: g for path, g in assignment.items() if _is_of(path, i)}
        kept = None if folder is None else load_arrays(folder, f"layer_{i}")
        if kept is not None:
            made = _from_arrays(model, layer, own, kept)
        else:
            inputs = read_inputs(model, layer, xs, steps) if reads else {}
            changed, inputs = smoothed(model.config, layer, own, inputs, methods)
            made = round_layer(model.config, changed, own, inputs, methods)
            if "gptq" in methods:
                unseen |= {p for p in own if grams_of(inputs, p, _count(changed, p, model)) is None}
            if folder is not None:
                save_arrays(folder, f"layer_{i}", _as_arrays(made))
        if reads:
            plain = dataclasses.replace(made, params=_floats(made.params))
            xs = [run_layer(model, plain, x, s)[0] for x, s in zip(xs, steps, strict=True)]
        rounded.append(made)
        progress(i + 1, len(model.layers))
    if unseen:
        notes(f"rounded to the nearest, as their inputs are not seen: {', '.join(sorted(unseen))}")
    params = dict(model.ends)
    for path, dims in END_DIMS.items():
        if path in assignment and path in params:
            params[path] = _rounded(params[path], dims, assignment[path], None)
    return dataclasses.replace(model, ends=params, layers=tuple(rounded))


def _is_of(path: str, i: int) -> bool:
    return path.partition(".")[0] == str(i)


def _count(layer: Layer, path: str, model: LayeredModel) -> int:
    dims = layer_dims(model.config, layer.spec)[path]
    return len(matrices(leaf(layer.params, path), dims))


def round_layer(
    config: ModelConfig, layer: Layer, own: Assignment, inputs: Inputs, methods: Sequence[Method]
) -> Layer:
    """The layer with RoundedParameters for the weights that have a grid, by their path in it."""
    params, dims = layer.params, layer_dims(config, layer.spec)
    prepared_by: dict[int, PreparedInputs] = {}  # weights that read the same share it

    def prepared_of(path: str, count: int) -> list[PreparedInputs] | None:
        grams = grams_of(inputs, path, count) if "gptq" in methods else None
        for gram_KK in grams or []:
            if id(gram_KK) not in prepared_by:
                prepared_by[id(gram_KK)] = prepare(gram_KK)
        return None if grams is None else [prepared_by[id(gram_KK)] for gram_KK in grams]

    for path, grid in own.items():
        w = leaf(params, path)
        read = prepared_of(path, len(matrices(w, dims[path])))
        params = with_leaf(params, path, _rounded(w, dims[path], grid, read))
    return dataclasses.replace(layer, params=params)


def _rounded(
    w: np.ndarray, dims: MatrixDims, grid: Grid, inputs: Sequence[PreparedInputs] | None
) -> RoundedParameter:
    rows = [
        round_to_nearest(w_NK, grid) if inputs is None else gptq(w_NK, inputs[i], grid)
        for i, w_NK in enumerate(matrices(w, dims))
    ]
    return as_parameter(rows, w.shape, dims, grid)


def smoothed(
    config: ModelConfig, layer: Layer, own: Assignment, inputs: Inputs, methods: Sequence[Method]
) -> tuple[Layer, Inputs]:
    """The same function with inputs scaled as a method says, and the sums of those inputs."""
    if not {"awq", "smoothquant"} & set(methods):
        return layer, inputs
    dims = layer_dims(config, layer.spec)
    for name, readers in places(layer).items():
        read = [path for path in readers if path in own]
        if not read or name not in inputs:
            continue
        rows = [(matrices(leaf(layer.params, path), dims[path]), own[path]) for path in read]
        sums, spread = inputs[name], _spread(layer, name)
        if "smoothquant" in methods:
            largest_w_K = np.max([np.abs(w).max((0, 1)) for w, _ in rows], axis=0)
            sizes = [_joined(layer, name, x) for x in (sums.largest_K, largest_w_K)]
            factor = smoothing(*sizes, SMOOTH_EXPONENT)
        else:
            grams = [
                grams_of(inputs, path, len(w)) for path, (w, _) in zip(read, rows, strict=True)
            ]

            def loss(factor: np.ndarray, rows=rows, grams=grams, spread=spread) -> float:
                return _loss(rows, grams, spread(factor))

            factor, _ = best_factor(_joined(layer, name, sums.total_K / max(sums.tokens, 1)), loss)
        layer = scale_inputs(layer, name, factor)
        inputs = inputs | _divided(inputs, name, spread(factor))
    return layer, inputs


def _loss(rows: Any, grams: Any, factor_K: np.ndarray) -> float:
    """What the products of some weights lose when their inputs are scaled and they are rounded."""
    total = 0.0
    for (w_XNK, grid), own in zip(rows, grams, strict=True):
        for w_NK, gram_KK in zip(w_XNK, own or [], strict=False):
            codes_NK, steps = round_to_nearest((w_NK * factor_K).astype(np.float32), grid)
            error_NK = decoded(codes_NK, steps, grid) / factor_K - w_NK
            total += float(row_losses(error_NK, gram_KK).sum())
    return total


def _joined(layer: Layer, name: str, value_K: np.ndarray) -> np.ndarray:
    """Of heads the largest of each group's, [G * C]: they share their values."""
    if name != "heads":
        return value_K
    config: Any = layer.spec.attention
    shape = (config.num_kv_heads, -1, config.head_dim)
    return value_K.reshape(shape).max(1).reshape(-1)


def _spread(layer: Layer, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """From factors of `_joined` to those of each input."""
    if name != "heads":
        return lambda factor: factor
    config: Any = layer.spec.attention
    each = config.num_heads // config.num_kv_heads
    shape = (config.num_kv_heads, config.head_dim)
    return lambda factor: np.repeat(factor.reshape(shape), each, axis=0).reshape(-1)


def _divided(inputs: Inputs, name: str, factor_K: np.ndarray) -> Inputs:
    names = [name, *(x for x in inputs if name == "ffn" and x.startswith("experts."))]
    return {x: inputs[x].divided(factor_K) for x in names}


def _as_arrays(layer: Layer) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for path, x in jax.tree.leaves_with_path(layer.params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if isinstance(x, RoundedParameter):
            arrays[f"{name}|codes"] = x.codes.view(np.int8)
            arrays[f"{name}|scales"] = x.scales_NS
            if x.offsets_NS is not None:
                arrays[f"{name}|offsets"] = x.offsets_NS
        else:
            arrays[f"{name}|values"] = np.asarray(x)
    return arrays


def _from_arrays(
    model: LayeredModel, layer: Layer, own: Assignment, arrays: Mapping[str, np.ndarray]
) -> Layer:
    params, dims = layer.params, layer_dims(model.config, layer.spec)
    for key in arrays:
        path, _, what = key.partition("|")
        if what == "values":
            params = with_leaf(params, path, arrays[key])
        elif what == "codes":
            grid = own[path]
            codes = arrays[key]
            if grid.format == "fp8":
                codes = codes.view("float8_e4m3fn")
            found = RoundedParameter(
                grid.format,
                codes,
                arrays[f"{path}|scales"],
                arrays.get(f"{path}|offsets"),
                dims[path],
                grid.scale_dtype,
            )
            params = with_leaf(params, path, found)
    return dataclasses.replace(layer, params=params)
