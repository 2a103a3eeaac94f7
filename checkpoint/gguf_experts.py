"""Experts' gate and up projections in one tensor, as newer GGUF files may hold them: llama.cpp
multiplies by both at once.

E experts, F d_ff, D d_model; ffn_gate_up_exps.weight is [E, 2 F, D], the gate's rows first, its
bias [E, 2 F].
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoint.gguf_files import GGUFFile
from configs.checks import UserError

FUSED, HALVES = ".ffn_gate_up_exps.", (".ffn_gate_exps.", ".ffn_up_exps.")


class SplitExperts:
    """A file's tensors with each ffn_gate_up_exps as ffn_gate_exps and ffn_up_exps; others as they
    are."""

    def __init__(self, file: GGUFFile) -> None:
        """
        Raises:
          UserError: a fused tensor whose rows are no two halves, or beside one of its parts.
        """
        self.path, self._file = file.path, file
        self._halves: dict[str, tuple[str, int]] = {}
        """By the name of a part: the fused tensor, and which half of it."""
        self._shapes = dict(file.shapes)
        for name in file.shapes:
            if FUSED in name:
                self._split(name)

    def _split(self, name: str) -> None:
        experts, rows, *width = self._shapes.pop(name)
        parts = [name.replace(FUSED, half) for half in HALVES]
        if rows % 2 or any(part in self._file.shapes for part in parts):
            raise UserError(
                f"{self.path} has {name} of shape {self._file.shapes[name]}, expected [experts, 2 "
                f"d_ff, ...], and neither {parts[0]} nor {parts[1]} beside it"
            )
        for half, part in enumerate(parts):
            self._shapes[part] = (experts, rows // 2, *width)
            self._halves[part] = name, half

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file(self, name: str) -> Path:
        return self._file.file(self._halves[name][0] if name in self._halves else name)

    def read(self, name: str) -> np.ndarray:
        return self.read_rows(name, 0, self._shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The places [start, stop) of the first dim; of a part its experts, one by one."""
        if name not in self._halves:
            return self._file.read_rows(name, start, stop)
        fused, half = self._halves[name]
        shape = self._shapes[name]
        count = shape[1]
        if len(shape) == 2:
            return self._file.read_rows(fused, start, stop)[:, half * count : (half + 1) * count]
        out = np.empty((stop - start, *shape[1:]), np.float32)
        for expert_FD, e in zip(out, range(start, stop), strict=True):
            first = (2 * e + half) * count
            expert_FD[...] = self._file.read_matrix(fused, first, first + count)
        return out
