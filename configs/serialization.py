"""Configs as JSON and back, and what two of them differ in."""

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar

from configs.checks import UserError, require

C = TypeVar("C")

RENAMED = {
    "AttentionConfig": {"num_sinks": "num_sink_tokens", "learned_sinks": "sink_logits"},
    "LocalSparseAttentionConfig": {"num_sinks": "num_sink_tokens"},
}
"""Fields by the names that older files give them: class -> {old: new}. Read, never written."""


def to_json(config: Any) -> str:
    """The config as indented JSON; `from_json` gives an equal config back."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def finite_json(tree: Any, **options: Any) -> str:
    """The tree as JSON, which knows no NaN and no infinity: null stands for both.

    Args:
      options: of json.dumps.
    """
    return json.dumps(_without_nan(tree), allow_nan=False, **options)


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {name: _without_nan(value) for name, value in tree.items()}
    return [_without_nan(x) for x in tree] if isinstance(tree, (list, tuple)) else tree


def from_json(cls: type[C], text: str, *, where: str) -> C:
    """Reads a config written by `to_json`.

    Args:
      cls: the config class, e.g. RunConfig.
      where: file name, for the error's sentence.
    Raises:
      UserError: not JSON, an unknown or missing setting, or a value of the wrong type.
    """
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where} is not valid JSON ({error}): restore it or start a new run"
        ) from error
    return from_tree(cls, tree, where)


def from_tree(annotation: Any, value: Any, where: str) -> Any:
    """The value as the annotated type: dataclasses, tuples, unions and plain values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(typing.cast(type, annotation), value, where)
    if origin is Literal:
        require(value in arguments, f"{where} is {value!r}, expected one of {arguments}")
        return value
    if annotation is Any:
        return value
    if origin in (tuple, list):
        require(isinstance(value, list), f"{where} is {_shown(value)}, expected a list")
        return origin(_build_items(arguments[0], value, where))
    if origin is dict:
        require(isinstance(value, dict), f"{where} is {_shown(value)}, expected an object")
        return {
            name: from_tree(arguments[1], item, f"{where}.{name}") for name, item in value.items()
        }
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    number = annotation is float and isinstance(value, int) and not isinstance(value, bool)
    right_type = number or type(value) is annotation
    require(
        right_type,
        f"{where} is {_shown(value)}, expected {getattr(annotation, '__name__', annotation)}",
    )
    require(
        not isinstance(value, float) or math.isfinite(value),
        f"{where} is {value}, expected a number",
    )
    return annotation(value)


def _build_items(annotation: Any, values: list[Any], where: str) -> list[Any]:
    if annotation in (int, str) and all(type(value) is annotation for value in values):
        return values  # at once: a corpus has millions of documents
    return [from_tree(annotation, item, f"{where}.{i}") for i, item in enumerate(values)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    if len(choices) > 1:
        kinds = {choice.__dataclass_fields__["kind"].default: choice for choice in choices}
        kind = value.get("kind") if isinstance(value, dict) else None
        is_known = isinstance(kind, str) and kind in kinds
        require(is_known, f"{where}.kind is {kind!r}, expected one of {tuple(kinds)}")
        return from_tree(kinds[kind], value, where)
    return from_tree(choices[0], value, where)


def _build_dataclass(cls: type, value: Any, where: str) -> Any:
    require(
        isinstance(value, dict),
        f"{where} is {_shown(value)}, expected the settings of {cls.__name__}",
    )
    value = _with_new_names(cls, value, where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    require(
        not unknown, f"{where} has unknown settings {unknown}; {cls.__name__} has {sorted(fields)}"
    )
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    require(not missing, f"{where} lacks the settings {missing} of {cls.__name__}")
    return cls(
        **{name: from_tree(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    )


def _with_new_names(cls: type, value: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings with RENAMED ones by their new names."""
    renamed = RENAMED.get(cls.__name__, {})
    twice = [f"{old} and {new}" for old, new in renamed.items() if old in value and new in value]
    require(not twice, f"{where} has both {', '.join(twice)}, one setting: leave the first out")
    return {renamed.get(name, name): item for name, item in value.items()}


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Sentences naming each setting whose value differs, e.g. 'model.d_model was 128, now 256'."""
    if type(before) is not type(after) or not dataclasses.is_dataclass(before):
        if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
            pairs = enumerate(zip(before, after, strict=True))
            return [line for i, (a, b) in pairs for line in differences(a, b, f"{prefix}.{i}")]
        return [] if before == after else [f"{prefix} was {before!r}, now {after!r}"]
    lines = []
    for field in dataclasses.fields(before):
        name = f"{prefix}.{field.name}" if prefix else field.name
        lines += differences(getattr(before, field.name), getattr(after, field.name), name)
    return lines
