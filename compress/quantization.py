"""Quantisation from source to target: which grids, rounding, what that costs, the smaller file."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from checkpoint.rounded import RoundedParameter, ScaleDtype
from checkpoint.rounded_folder import BFLOAT16, is_halved
from checkpoint.weight_map import flatten, leaf_name
from compress.assignment import assigned, costs, fisher, num_inputs, weights_of
from compress.calibration import Rows
from compress.grids import Grid
from compress.importance import Progress
from compress.layered import LayeredModel, Tree, layered
from compress.pruning import fingerprint_of
from compress.quality import Quality, compare, hidden_of
from compress.rounding import Assignment, Method, in_floats, prepared, round_model
from compress.working_folder import working_folder
from configs.checks import UserError, require
from infer.convert import Conversion, Form, convert, export_family_of
from infer.sources import Progress as Elements
from infer.sources import Source

Weights = Literal["bfloat16", "fp8", "int8", "int4", "int4_affine", "mixed"]
BLOCKS = (128, 64, 32)
"""Inputs that share a scale in folders: the largest that divides those of all weights."""
SENSITIVITY_STEPS = 8
"""Batches of the calibration text that the Fisher information is taken from."""
ROUNDS = 6
"""Assignments that a budget in nats tries."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What the weights become."""

    weights: Weights
    methods: tuple[Method, ...] = ("rtn",)
    budget_nats: float | None = None
    """mixed only: the loss may rise by so much on held-out text."""
    budget_bytes: int | None = None
    """mixed only: of all weights."""
    vocabulary: Weights | None = None
    """Of embedding and output layer; None: int8 where the others are int4, as the others else."""
    block: int | None = None
    """Inputs that share a scale; None: 32 in a GGUF, in folders see BLOCKS."""

    def __post_init__(self) -> None:
        count = sum(x is not None for x in (self.budget_nats, self.budget_bytes))
        is_mixed = self.weights == "mixed"
        require(
            count == int(is_mixed),
            "a budget goes with --weights mixed, and one of the two kinds must be named: --budget "
            "0.02nats or --budget 60MB",
        )
        require(
            self.vocabulary is None or (not is_mixed and self.vocabulary != "mixed"),
            "vocabulary goes with weights of one kind: mixed ones choose it by themselves",
        )
        require(
            self.weights != "bfloat16" or set(self.methods) <= {"rtn"},
            f"method {','.join(self.methods)} has no effect on bfloat16: leave it out",
        )
        for name in ("budget_nats", "budget_bytes", "block"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class QuantizationReport:
    """What it became, and what it costs."""

    parameters: int
    float32_bytes: int
    weight_bytes: int
    """Of all weights with their scales; those that stay in floats in 2 bytes, norms in 4."""
    bits: dict[str, float]
    """Bits per weight with scales, by what they are in; and how many (`counts`)."""
    counts: dict[str, int]
    quality: Quality
    predicted: float | None
    """mixed: nats that the assignment was expected to cost."""

    @property
    def ratio(self) -> float:
        return self.weight_bytes / self.float32_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.parameters

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return dataclasses.asdict(self) | {
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "lost": self.quality.lost,
        }


def quantize_source(
    source: Source,
    target: Path,
    quantization: Quantization,
    rows: tuple[Rows, Rows],
    conversion: Conversion,
    *,
    reading: Elements = lambda done, total: None,
    rounding: Progress = lambda done, total: None,
    notes: Callable[[str], None] = lambda _: None,
) -> QuantizationReport:
    """Writes the rounded model, whole or not at all; layers of an interrupted pass are kept.

    Args:
      rows: to calibrate on, and to measure on.
      notes: is told what was left out or done otherwise.
    Raises:
      UserError: a form that can't hold the result, or a budget that can't be met.
    """
    check(source, target, quantization, conversion)
    fingerprint = fingerprint_of(source, repr((quantization, conversion)), rows)
    with working_folder(target, fingerprint) as folder:
        original = layered(*source.load(progress=reading))
        start = prepared(original, quantization.methods)
        if quantization.weights == "bfloat16":
            start = halved(start)
        steps, held_out = rows[0].steps(), rows[1].steps()
        hidden = hidden_of(original, held_out)

        def tried(assignment: Assignment, methods: Sequence[Method], at: Path | None, tell=notes):
            made = round_model(
                start, assignment, methods, steps, folder=at, progress=rounding, notes=tell
            )
            return made, compare(original, in_floats(made), held_out, hidden)

        def quick(assignment: Assignment) -> Quality:
            return tried(assignment, ("rtn",), None)[1]

        assignment, predicted = choose(start, quantization, conversion.to, steps, quick)
        rounded, quality = tried(assignment, quantization.methods, folder)
        config, variables = rounded.assembled()
        if quantization.weights == "bfloat16" and conversion.to == "orbax":
            variables["params"] = _typed(variables["params"])
        held = source.with_variables(config, variables, fingerprint)
        convert(held, target, conversion, notes=notes)
    return report_of(rounded, quality, predicted)


def check(source: Source, target: Path, quantization: Quantization, conversion: Conversion) -> None:
    """
    Raises:
      UserError: see `quantize_source`; nothing is read for it.
    """
    config = dataclasses.replace(source.config, multi_token=None)
    if "rotate" in quantization.methods:
        config = dataclasses.replace(config, tie_embeddings=False)
    export_family_of(source.with_variables(config, {}, ""), target, conversion)
    wanted = (quantization.weights, quantization.vocabulary)
    require(
        conversion.to != "gguf" or "fp8" not in wanted,
        "llama.cpp has no fp8: write a folder, or take int8",
    )
    require(
        conversion.to == "gguf" or "int4_affine" not in wanted,
        "int4_affine is llama.cpp's Q4_1: write a .gguf, or take int4",
    )
    require(
        conversion.to != "gguf" or quantization.block in (None, 32),
        f"block={quantization.block}: llama.cpp's blocks are of 32, leave it out",
    )
    require(
        conversion.to != "huggingface" or quantization.vocabulary in (None, "bfloat16"),
        f"vocabulary={quantization.vocabulary}: embedding and output layer of a Hugging Face "
        "folder stay in bfloat16, as no engine reads them otherwise: leave it out",
    )


def grids_of(model: LayeredModel, quantization: Quantization, form: Form) -> dict[str, Grid]:
    """The grids that a form has, by the weights' name."""
    is_gguf = form == "gguf"
    block = quantization.block or (32 if is_gguf else _common_block(model, form))
    scale: ScaleDtype = "float16" if is_gguf else "bfloat16"
    grids = {"int8": Grid("int8", block, scale), "int4": Grid("int4", block, scale)}
    if is_gguf:
        return grids | {"int4_affine": Grid("int4", block, scale, is_affine=True)}
    return grids | {"fp8": Grid("fp8", 0, scale)}


def _common_block(model: LayeredModel, form: Form) -> int:
    inputs = {num_inputs(w, dims) for path, (w, dims) in _roundable(model, form).items()}
    for block in BLOCKS:
        if all(count % block == 0 for count in inputs):
            return block
    return next((b for b in (16, 8, 4, 2) if all(count % b == 0 for count in inputs)), 32)


def _roundable(model: LayeredModel, form: Form) -> dict[str, Any]:
    """The weights that a form holds in few bits; Hugging Face's are the layers' alone."""
    found = weights_of(model)
    if form == "huggingface":
        return {path: x for path, x in found.items() if path not in ("embedding", "output")}
    return found


def halved(model: LayeredModel) -> LayeredModel:
    """The model with the values that its matrices have in bfloat16, in float32."""

    def own(tree: Tree) -> Tree:
        def cast(path: Any, x: np.ndarray) -> np.ndarray:
            return (
                x.astype(BFLOAT16).astype(np.float32) if is_halved(leaf_name(path), x.ndim) else x
            )

        return jax.tree_util.tree_map_with_path(cast, tree)

    layers = tuple(dataclasses.replace(x, params=own(x.params)) for x in model.layers)
    return dataclasses.replace(model, ends=own(model.ends), layers=layers)


def _typed(params: Tree) -> Tree:
    """Parameters whose matrices are bfloat16; of periods, which are stacked, those of one layer."""

    def cast(path: Any, x: np.ndarray) -> np.ndarray:
        name = f"params.{leaf_name(path)}"
        return x.astype(BFLOAT16) if is_halved(name, x.ndim) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def choose(
    model: LayeredModel,
    quantization: Quantization,
    form: Form,
    steps: Sequence[Any],
    measure: Callable[[Assignment], Quality],
) -> tuple[Assignment, float | None]:
    """The grid of each weight, and of mixed ones what they were expected to cost in nats.

    Args:
      measure: the quality of an assignment, rounded to the nearest.
    Raises:
      UserError: a budget that can't be met.
    """
    grids, held = grids_of(model, quantization, form), _roundable(model, form)
    if quantization.weights != "mixed":
        return _uniform(held, quantization, grids), None
    information = fisher(model, steps[:SENSITIVITY_STEPS])
    options = costs(held, [None, *grids.values()], information)
    if quantization.budget_bytes is not None:
        rest = _rest_bytes(model, held)
        found = assigned(options, quantization.budget_bytes - rest)
        if found is None:
            least = rest + sum(min(n for _, _, n in item) for item in options.values())
            raise UserError(
                f"the smallest assignment has {least:,} bytes of weights, and "
                f"{quantization.budget_bytes:,} were asked for: prune the model first"
            )
        return found[0], found[1]
    assert quantization.budget_nats is not None
    return smallest_within(options, quantization.budget_nats, measure)


def _uniform(
    held: Mapping[str, Any], quantization: Quantization, grids: dict[str, Grid]
) -> Assignment:
    weights, vocabulary = quantization.weights, quantization.vocabulary
    if vocabulary is None:
        vocabulary = "int8" if weights in ("int4", "int4_affine") else weights
    assignment: dict[str, Grid] = {}
    for path, (w, dims) in held.items():
        is_end = path in ("embedding", "output")
        grid = grids.get(vocabulary if is_end else weights)
        if grid is not None and grid.fits(num_inputs(w, dims)):
            assignment[path] = grid
    return assignment


def smallest_within(
    options: dict[str, Any], nats: float, measure: Callable[[Assignment], Quality]
) -> tuple[Assignment, float]:
    """The smallest assignment found whose loss rises by at most so much: by halving the interval of
    bytes, each tried on the text.

    Raises:
      UserError: none does.
    """
    low = sum(min(n for _, _, n in item) for item in options.values())
    high = sum(max(n for _, _, n in item) for item in options.values())
    best: tuple[Assignment, float] | None = None
    for _ in range(ROUNDS):
        middle = (low + high) // 2
        found = assigned(options, middle)
        if found is not None and measure(found[0]).lost <= nats:
            best, high = found[:2], middle
        else:
            low = middle
    if best is None:
        raise UserError(
            f"no assignment tried loses at most {nats} nats: allow more, or take --weights int8"
        )
    return best


def _rest_bytes(model: LayeredModel, held: Mapping[str, Any]) -> int:
    """Of what is never rounded: norms, biases, routers, and what the form holds in floats."""
    rounded = {id(w) for w, _ in held.values()}
    return sum(_float_bytes(name, x) for name, x in _leaves(model) if id(x) not in rounded)


def _leaves(model: LayeredModel) -> list[tuple[str, Any]]:
    trees = (model.ends, *(layer.params for layer in model.layers))
    return [leaf for tree in trees for leaf in flatten(tree).items()]


def _float_bytes(name: str, x: Any) -> int:
    """Of what is not rounded: 2 bytes a weight, 4 of vectors and routers."""
    return (2 if is_halved(name, np.ndim(x)) else 4) * x.size


def report_of(model: LayeredModel, quality: Quality, predicted: float | None) -> QuantizationReport:
    """Bytes and bits of a rounded model."""
    total, size = 0, 0
    held: dict[str, list[int]] = {}
    for name, x in _leaves(model):
        if isinstance(x, RoundedParameter):
            what, num_bytes = x.format, x.num_bytes
            if x.offsets_NS is not None:
                what = f"{what} with offsets"
        else:
            what, num_bytes = "float", _float_bytes(name, x)
        counts = held.setdefault(what, [0, 0])
        counts[0] += x.size
        counts[1] += num_bytes
        total, size = total + num_bytes, size + x.size
    bits = {what: 8 * num_bytes / count for what, (count, num_bytes) in held.items()}
    counts = {what: count for what, (count, _) in held.items()}
    return QuantizationReport(size, 4 * size, total, bits, counts, quality, predicted)
