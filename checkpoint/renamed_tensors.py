"""Tensors by the names that their family releases, whatever names a file has for them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.logical_tensors import LogicalTensors
from configs.checks import UserError


class RenamedTensors:
    """As LogicalTensors, by other names."""

    def __init__(self, tensors: LogicalTensors, renames: Sequence[tuple[str, str]]) -> None:
        """
        Args:
          renames: (regular expression, replacement) for parts of names: Family.renames.
        Raises:
          UserError: two tensors that would have one name.
        """
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for own in tensors.shapes:
            name = own
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            other = self._names.setdefault(name, own)
            if other != own:
                raise UserError(
                    f"{tensors.file(own)} has {own}, and {other} is the same tensor by another "
                    "name: keep one of them"
                )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensors.shapes[own] for name, own in self._names.items()
        }

    def sources(self, name: str) -> tuple[str, ...]:
        return self._tensors.sources(self._names[name])

    def file(self, name: str) -> Path:
        return self._tensors.file(self._names[name])

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        return self._tensors.read(self._names[name], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: Any = np.float32) -> np.ndarray:
        return self._tensors.read_rows(self._names[name], start, stop, dtype)
