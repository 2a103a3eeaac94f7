"""Adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, with the names of the
family that the model belongs to.

A linear layer W [out, in] has lora_A [r, in] and lora_B [out, r], and adds alpha / r * B A. One
tensor of all experts has them side by side: A [E r, in], expert by expert, and B [out, r E], the
experts of each rank together. Where several of our matrices make one public tensor (gate and up), A
holds theirs one below the other and B is block-diagonal.

Arrays by path as in the variables, with the dimensions of model/adapters.py: S stacks, I inputs, P
parts, O outputs, r rank.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint.logical_tensors import LogicalTensors
from checkpoint.weight_map import Entry
from configs.checks import UserError, require
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter
from formats.small_files import read_json_object

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
UNREAD = ("use_dora", "lora_bias", "fan_in_fan_out")
"""Settings that add something other than B A."""


class MatrixForm(NamedTuple):
    """A parameter that can have an adapter: model.adapters.AdaptedMatrix."""

    shape: tuple[int, ...]
    stack: int
    inputs: int
    parts: int


@dataclass(frozen=True)
class _Factors:
    """The part of one public tensor that an entry's adapter fills."""

    entry: Entry
    form: MatrixForm

    @property
    def is_stacked(self) -> bool:
        """Whether the public tensor holds all experts."""
        return None in self.entry.place[: self.form.stack]

    @property
    def whole_parts(self) -> tuple[int, ...]:
        """Dims of parts that the public tensor holds together."""
        first = self.form.stack + self.form.inputs
        dims = range(first, first + self.form.parts)
        return tuple(dim for dim in dims if self.entry.place[dim] is None)

    def dims(self) -> tuple[list[int], list[int]]:
        """The parameter's whole dims of inputs and of outputs, in the public order."""
        first, last = self.form.stack, self.form.stack + self.form.inputs
        inputs = [d for d in self._whole() if first <= d < last]
        outputs = [d for d in self._whole() if d >= last]
        return sorted(inputs, key=self._axis), sorted(outputs, key=self._axis)

    def _whole(self) -> list[int]:
        return [dim for dim, at in enumerate(self.entry.place) if at is None]

    def _axis(self, dim: int) -> int:
        return self.entry.axes[self._whole().index(dim)]

    def ordered(self, x: np.ndarray, dims: Sequence[int], *, to_public: bool) -> np.ndarray:
        """x, whose first dims are these in the public order, with the entries of the one that the
        entry orders anew in the public order or in ours.
        """
        entry = self.entry
        if entry.order is None:
            return x
        dim = self._whole()[entry.order_axis]
        if dim not in dims:
            return x
        order = np.argsort(entry.order) if to_public else entry.order
        return x.take(order, axis=list(dims).index(dim))

    def place(self, *, parts: bool) -> tuple[Any, ...]:
        """Index of the entry's part in A or B: the stack, and with parts those that are fixed."""
        form = self.form
        stack = tuple(slice(None) if at is None else at for at in self.entry.place[: form.stack])
        first = form.stack + form.inputs
        fixed = self.entry.place[first : first + form.parts] if parts else ()
        return (*stack, *(slice(None) if at is None else at for at in fixed))


def public_factors(
    entry: Entry, form: MatrixForm, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(lora_A, lora_B) of a public tensor."""
    own = _Factors(entry, form)
    if own.is_stacked:
        count = form.shape[form.stack - 1]
        pairs = [_linear(_of_expert(own, e), a, b) for e in range(count)]
        a_ErI, b_EOr = np.stack([x for x, _ in pairs]), np.stack([x for _, x in pairs])
        return a_ErI.reshape(-1, a_ErI.shape[2]), b_EOr.transpose(1, 2, 0).reshape(
            b_EOr.shape[1], -1
        )
    return _linear(own, a, b)


def _of_expert(own: _Factors, expert: int) -> _Factors:
    """The part of one expert; the tensor that it would be by itself."""
    entry, stack = own.entry, own.form.stack
    place = (*entry.place[: stack - 1], expert, *entry.place[stack:])
    axes = tuple(axis - 1 for axis in entry.axes[1:])
    order_axis = entry.order_axis - 1 if entry.order is not None else 0
    alone = Entry(
        entry.name,
        entry.shape[1:],
        entry.leaf,
        place,
        entry.split[1:],
        axes,
        entry.order,
        order_axis,
    )
    return _Factors(alone, own.form)


def _linear(own: _Factors, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    form, (inputs, outputs) = own.form, own.dims()
    first, parts = form.stack + form.inputs, own.whole_parts
    a_IPr = a[own.place(parts=False)]
    fixed = own.entry.place[first : first + form.parts]
    a_IPr = a_IPr[(..., *(slice(None) if at is None else at for at in fixed), slice(None))]
    # Inputs in the public order, the parts' ranks side by side.
    a_IPr = a_IPr.transpose([d - form.stack for d in inputs] + list(range(form.inputs, a_IPr.ndim)))
    a_IPr = own.ordered(a_IPr, inputs, to_public=True)
    num_inputs = math.prod(form.shape[d] for d in inputs)
    lora_A = a_IPr.reshape(num_inputs, -1).T
    b_PrO = b[own.place(parts=True)]
    sizes = [form.shape[d] for d in parts]
    rank, count = b_PrO.shape[len(parts)], math.prod(sizes)
    b_prO = b_PrO.reshape(count, rank, *b_PrO.shape[len(parts) + 1 :])
    blocks = np.zeros((count, *b_prO.shape[2:], count, rank), b.dtype)
    for p in range(count):
        blocks[p, ..., p, :] = np.moveaxis(b_prO[p], 0, -1)
    blocks = blocks.reshape(*sizes, *b_prO.shape[2:], count * rank)
    natural = sorted(outputs)
    blocks = blocks.transpose([natural.index(d) for d in outputs] + [len(outputs)])
    blocks = own.ordered(blocks, outputs, to_public=True)
    return np.ascontiguousarray(lora_A), blocks.reshape(-1, count * rank)


def own_factors(
    entry: Entry, form: MatrixForm, lora_A: np.ndarray, lora_B: np.ndarray
) -> list[tuple[tuple[Any, ...], tuple[Any, ...], np.ndarray, np.ndarray]]:
    """Where the factors of a public tensor lie in A and B, and what lies there; all parts of a
    tensor get its whole lora_A.

    Returns:
      (index into a's dims but its last, index into b's stack and parts, [I..., r], [r, O...]).
    Raises:
      UserError: factors of another shape.
    """
    own = _Factors(entry, form)
    if own.is_stacked:
        count = form.shape[form.stack - 1]
        rank = lora_A.shape[0] // count
        a_ErI = lora_A.reshape(count, rank, -1)
        b_OrE = lora_B.reshape(lora_B.shape[0], -1, count)
        found = []
        for e in range(count):
            found += _own_linear(_of_expert(own, e), a_ErI[e], b_OrE[:, :, e])
        return found
    return _own_linear(own, lora_A, lora_B)


def _own_linear(own: _Factors, lora_A: np.ndarray, lora_B: np.ndarray) -> list[Any]:
    form, (inputs, outputs) = own.form, own.dims()
    sizes = [[form.shape[d] for d in dims] for dims in (inputs, outputs)]
    expected = tuple(math.prod(x) for x in sizes)
    require(
        (lora_A.shape[1], lora_B.shape[0]) == expected and lora_A.shape[0] == lora_B.shape[1],
        f"the adapter of {own.entry.name} has A {lora_A.shape} and B {lora_B.shape}, for a matrix "
        f"of {expected[0]} inputs and {expected[1]} outputs: it is of another model",
    )
    a_Ir = own.ordered(lora_A.T.reshape(*sizes[0], -1), inputs, to_public=False)
    a_Ir = a_Ir.transpose([inputs.index(d) for d in sorted(inputs)] + [len(inputs)])
    b_Or = own.ordered(lora_B.reshape(*sizes[1], -1), outputs, to_public=False)
    b_Or = b_Or.transpose([outputs.index(d) for d in sorted(outputs)] + [len(outputs)])
    b_rO = np.moveaxis(b_Or, -1, 0)
    first, parts = form.stack + form.inputs, own.whole_parts
    found = []
    for numbers in np.ndindex(*(form.shape[d] for d in parts)):
        chosen = dict(zip(parts, numbers, strict=True))
        place = tuple(chosen.get(d, own.entry.place[d]) for d in range(first, first + form.parts))
        stack = own.place(parts=False)
        part = b_rO[(slice(None), *numbers)] if parts else b_rO
        found.append(((*stack, *[slice(None)] * form.inputs, *place), (*stack, *place), a_Ir, part))
    return found


def write_peft(
    folder: Path,
    entries: Sequence[Entry],
    forms: Mapping[str, MatrixForm],
    adapters: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    rank: int,
    alpha: float,
    base: str,
) -> None:
    """Writes the two files.

    Args:
      entries: of the family's table, for the whole model.
      forms, adapters: (a, b) by the parameter's path in the parameters, the factor not in b.
      base: name of the model that they are of.
    """
    tensors: dict[str, np.ndarray] = {}
    modules, parameters, patterns = set(), set(), {}
    for entry in entries:
        path = entry.leaf.removeprefix("params.")
        if path not in adapters:
            continue
        require(
            not entry.is_partial,
            f"{entry.name} and {path} are cut differently, and an adapter of one is none of the "
            "other: merge it into the weights (--to huggingface)",
        )
        a, b = (x.astype(np.float32) for x in adapters[path])
        lora_A, lora_B = public_factors(entry, forms[path], a, b)
        own = _Factors(entry, forms[path])
        target = _target(entry.name if own.is_stacked else entry.name.removesuffix(".weight"))
        (parameters if own.is_stacked else modules).add(target)
        own_rank = rank * math.prod(forms[path].shape[d] for d in own.whole_parts)
        if own_rank != rank:
            patterns[rf".*\.{re.escape(target)}"] = own_rank
        module = _module(entry.name, is_stacked=own.is_stacked)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = lora_A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(lora_B)
    plan = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    whole = sum(x.nbytes for x in tensors.values()) + 1
    with TensorWriter(folder, plan, max_shard_bytes=whole, single=TENSORS) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "rank_pattern": patterns,
        "alpha_pattern": {name: alpha * own / rank for name, own in patterns.items()},
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _target(name: str) -> str:
    """The last words of a tensor's name, as PEFT targets it: without layers and experts."""
    return re.split(r"\.\d+\.", name)[-1]


def _module(name: str, *, is_stacked: bool) -> str:
    """The module whose adapter it is. Of two parameters of one module PEFT wraps the second around
    the first, whose tensors so lie a level deeper.
    """
    if not is_stacked or name.endswith(".weight"):
        return name.removesuffix(".weight")
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer" if parameter == "gate_up_proj" else module


def require_adapter(folder: Path) -> None:
    """
    Raises:
      UserError: the folder holds nothing of PEFT's.
    """
    require(
        (folder / CONFIG).is_file(),
        f"{folder} holds no {CONFIG}: give the folder that PEFT's save_pretrained wrote",
    )


def read_peft(
    folder: Path, entries: Sequence[Entry], forms: Mapping[str, MatrixForm]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(a, b) by the parameter's path, the factor in b; zeros where the adapter has none.

    Args:
      entries, forms: see `write_peft`.
    Raises:
      UserError: no adapter of PEFT's, one of another kind than LoRA, or one of another model.
    """
    require_adapter(folder)
    config = read_json_object(folder / CONFIG, "restore it")
    kind = config.get("peft_type")
    require(kind == "LORA", f"{folder / CONFIG} has peft_type={kind!r}, only 'LORA' is read")
    used = [name for name in UNREAD if config.get(name)]
    require(
        not used, f"{folder / CONFIG} uses {', '.join(used)}, which is not read: merge it in PEFT"
    )
    tensors = LogicalTensors(open_tensors(folder), None)
    left = set(tensors.shapes)
    found: dict[str, list[Any]] = {}
    for entry in entries:
        path = entry.leaf.removeprefix("params.")
        if path not in forms:
            continue
        module = _module(entry.name, is_stacked=_Factors(entry, forms[path]).is_stacked)
        names = [f"{PREFIX}{module}.lora_{which}.weight" for which in "AB"]
        if not left.issuperset(names):
            continue
        require(
            not entry.is_partial,
            f"{folder / TENSORS} has an adapter of {entry.name}, which is cut differently here: "
            "merge it in PEFT",
        )
        left -= set(names)
        lora_A, lora_B = (tensors.read(name) for name in names)
        rank = lora_A.shape[0]
        if _Factors(entry, forms[path]).is_stacked:
            rank //= forms[path].shape[forms[path].stack - 1]
        lora_B = lora_B * _scale(config, entry.name, rank)
        found.setdefault(path, []).extend(own_factors(entry, forms[path], lora_A, lora_B))
    require(
        not left,
        f"{folder / TENSORS} has {len(left)} tensors that no matrix of this model takes, the first "
        f"is {min(left, default='')}: only matrices of attention, feed-forward layers and experts "
        "have adapters here",
    )
    require(bool(found), f"{folder / TENSORS} holds no adapter")
    return {path: _assembled(forms[path], parts) for path, parts in found.items()}


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _of_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise UserError(f"{CONFIG} has lora_alpha={alpha!r}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that the module's name ends with, as a regular expression."""
    names = (name.removesuffix(".weight"), name)  # of a module, and of a parameter
    found = (v for k, v in patterns.items() if any(re.match(rf"(.*\.)?({k})$", x) for x in names))
    return next(found, otherwise)


def _assembled(form: MatrixForm, parts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Zeros, and the factors at their places; smaller ranks than the largest end in zeros."""
    rank = max(a.shape[-1] for _, _, a, _ in parts)
    first = form.stack + form.inputs
    stack, outputs = form.shape[: form.stack], form.shape[first + form.parts :]
    own_parts = form.shape[first : first + form.parts]
    a_all = np.zeros((*form.shape[: first + form.parts], rank), np.float32)
    b_all = np.zeros((*stack, *own_parts, rank, *outputs), np.float32)
    for at_a, at_b, a, b in parts:
        a_all[(*at_a, slice(0, a.shape[-1]))] = a
        b_all[(*at_b, slice(0, b.shape[0]))] = b
    return a_all, b_all
