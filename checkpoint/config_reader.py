"""A public config.json, asked by name and type."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.checks import UserError
from formats.small_files import read_json_object

_NEEDED: Any = object()


class Settings:
    """The values of a config.json or of a part of it.

    Each question takes all names that a setting ever had, the first that is there counts. Null
    counts as missing, but not as left out: `defaults` are for keys that are not there at all. A
    value of another type is a UserError that names file, key and value.
    """

    def __init__(
        self, values: dict[str, Any], where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
          where: the file, for sentences.
          defaults: values of keys that are left out: the family's, by transformers' config class.
        """
        self.values, self.where, self.defaults = values, where, defaults or {}

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """
        Raises:
          UserError: no file, or no JSON object.
        """
        try:
            return cls(read_json_object(path), str(path))
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing: a checkpoint in Hugging Face form has one"
            ) from error

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Settings":
        """The same values, with others for what they leave out."""
        return Settings(self.values, self.where, defaults)

    def __contains__(self, name: str) -> bool:
        return self._find((name,), None)[1] is not None

    def integer(
        self, *names: str, default: Any = _NEEDED, least: int = 1, most: int = 2**31 - 1
    ) -> Any:
        """An int from `least` to `most`."""
        name, value = self._find(names, default)
        if name is None:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, *names: str, default: Any = _NEEDED) -> Any:
        """A finite float."""
        name, value = self._find(names, default)
        if name is None:
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:  # NaN too; ints have no end
            self._wrong(name, value, "a number")
        return float(value)

    def flag(self, *names: str, default: Any = _NEEDED) -> Any:
        name, value = self._find(names, default)
        if name is not None and not isinstance(value, bool):
            self._wrong(name, value, "true or false")
        return value

    def text(self, *names: str, choices: tuple[str, ...] = (), default: Any = _NEEDED) -> Any:
        """A string, one of `choices` where there are any."""
        name, value = self._find(names, default)
        if name is not None and (not isinstance(value, str) or (choices and value not in choices)):
            self._wrong(name, value, f"one of {choices}" if choices else "a string")
        return value

    def items(self, *names: str, of: type, default: Any = _NEEDED) -> Any:
        """A list whose items are all of one type."""
        name, value = self._find(names, default)
        if name is None:
            return value
        if not isinstance(value, list) or any(type(item) is not of for item in value):
            self._wrong(name, value, f"a list of {of.__name__}")
        return value

    def part(self, *names: str) -> "Settings | None":
        """An object inside this one; None where it is missing."""
        name, value = self._find(names, None)
        if name is None:
            return None
        if not isinstance(value, dict):
            self._wrong(name, value, "an object")
        return Settings(value, f"{self.where}: {name}")

    def expect(self, name: str, *allowed: Any) -> None:
        """What else than the allowed values (the first of which is meant when the key is missing)
        would change what is computed.
        """
        _, value = self._find((name,), allowed[0])
        if value not in allowed:
            self._wrong(name, value, f"{' or '.join(map(repr, allowed))}: nothing else is built")

    def _find(self, names: Sequence[str], default: Any) -> tuple[str | None, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        if not any(name in self.values for name in names):
            for name in names:
                if self.defaults.get(name) is not None:
                    return name, self.defaults[name]
        if default is _NEEDED:
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise UserError(f"{self.where} lacks {names[0]}{others}, which its model needs")
        return None, default

    def _wrong(self, name: str, value: Any, expected: str) -> None:
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
        raise UserError(f"{self.where} has {name}={shown}, expected {expected}")
