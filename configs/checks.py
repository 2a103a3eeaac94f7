"""Checks of settings: one sentence with what came and what was needed."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any


class UserError(ValueError):
    """Bad input that its sender can mend: scripts print the sentence alone and exit with code 2."""


def require(condition: bool, sentence: str) -> None:
    """
    Raises:
      UserError: the condition does not hold; it says `sentence`.
    """
    if not condition:
        raise UserError(sentence)


def require_finite(config: Any, prefix: str = "") -> None:
    """
    Raises:
      UserError: a float in the config, or in a config or tuple inside it, is infinite or no number.
    """
    if isinstance(config, float):
        require(
            math.isfinite(config),
            f"{prefix}={config} must be a finite number; where a setting can be left out, None "
            "does so",
        )
    elif isinstance(config, tuple):
        for i, item in enumerate(config):
            require_finite(item, f"{prefix}.{i}")
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            name = f"{prefix}.{field.name}" if prefix else field.name
            require_finite(getattr(config, field.name), name)


def require_choices(config: Any, prefix: str = "") -> None:
    """
    Raises:
      UserError: a setting in the config, or in a config or tuple inside it, is none of its choices.
    """
    if isinstance(config, tuple):
        for i, item in enumerate(config):
            require_choices(item, f"{prefix}.{i}")
    elif dataclasses.is_dataclass(config):
        for name, choices in choices_of(type(config)).items():
            value = getattr(config, name)
            where = f"{prefix}.{name}" if prefix else name
            require(value in choices, f"{where}={value!r} must be one of {choices}")
        for field in dataclasses.fields(config):
            where = f"{prefix}.{field.name}" if prefix else field.name
            require_choices(getattr(config, field.name), where)


@functools.cache
def choices_of(cls: type) -> dict[str, tuple[Any, ...]]:
    """The values that each setting of a config class has a list of."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        parts = typing.get_args(hint) if is_union else (hint,)
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if literals:
            others = tuple(None for part in parts if part is types.NoneType)
            found[name] = tuple(x for part in literals for x in typing.get_args(part)) + others
    return found


def require_seed(seed: int) -> None:
    """
    Raises:
      UserError: a seed that no key has (model/seeds.py).
    """
    require(
        0 <= seed < 2**63,
        f"seed={seed} must be at least 0 and below 2**63 (it is kept in 63 bits)",
    )


def require_text(text: str, name: str) -> None:
    """
    Raises:
      UserError: characters that UTF-8 has not: bytes of another encoding that came in as text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is no UTF-8 at character {error.start + 1} "
            f"({text[error.start : error.start + 1]!r}): send it as UTF-8"
        ) from error


def require_positive(config: Any, *names: str) -> None:
    """
    Raises:
      UserError: one of the config's settings is not above 0.
    """
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be greater than 0")
