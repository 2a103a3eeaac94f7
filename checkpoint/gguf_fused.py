"""Tensors that newer GGUF files may hold as one: experts' gate and up; queries, keys and values.
llama.cpp multiplies by them at once (create_tensor_gate_up_exps, create_tensor_qkv).

E experts, F d_ff, D d_model, H heads, G kv_heads, C head_dim.

    blk.N.ffn_gate_up_exps.weight  [E, 2 F, D]        the gate's rows first; bias [E, 2 F]
    blk.N.attn_qkv.weight          [(H + 2 G) C, D]   queries, keys, values; bias [(H + 2 G) C]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import Keys

from configs.checks import UserError
from formats.gguf.reader import GGUFFile

EXPERTS, EXPERT_PARTS = ".ffn_gate_up_exps.", (".ffn_gate_exps.", ".ffn_up_exps.")
DELTA_RATE = ".ssm_a"
"""Which layers with a delta net have: their attn_qkv is one tensor everywhere."""
GATE_ROW = ".ffn_gate_inp_shexp.weight"
"""A shared expert's gate: one row of a matrix in newer files, [1, D], a vector in others."""
HEADS, HEAD_PARTS = ".attn_qkv.", (".attn_q.", ".attn_k.", ".attn_v.")


@dataclass(frozen=True)
class Part:
    """Rows of a fused tensor."""

    fused: str
    first: int
    """Its first row: of the tensor, or of each expert."""
    count: int


class SplitTensors:
    """A file's tensors with those that are fused as the parts that other files have."""

    def __init__(self, file: GGUFFile) -> None:
        """
        Raises:
          UserError: a fused tensor that its parts don't fill, or beside one of them.
        """
        self.path, self._file = file.path, file
        self._parts: dict[str, Part] = {}
        self._shapes = dict(file.shapes)
        for name in file.shapes:
            if name.endswith(GATE_ROW) and file.shapes[name][:-1] == (1,):
                self._shapes[name] = file.shapes[name][1:]
            elif EXPERTS in name and len(file.shapes[name]) > 1:
                self._split(name, EXPERTS, EXPERT_PARTS, (1, 1), axis=1)
            elif HEADS in name and name.split(HEADS)[0] + DELTA_RATE not in file.shapes:
                self._split(name, HEADS, HEAD_PARTS, self._head_counts(), axis=0)

    def _head_counts(self) -> tuple[int, int, int]:
        """Heads of queries, keys and values."""
        values = self._file.metadata
        architecture = values.get(Keys.General.ARCHITECTURE)
        heads, kv_heads = (
            values.get(key.format(arch=architecture))
            for key in (Keys.Attention.HEAD_COUNT, Keys.Attention.HEAD_COUNT_KV)
        )
        kv_heads = heads if kv_heads is None else kv_heads
        for count in (heads, kv_heads):
            if type(count) is not int or count < 1:
                raise UserError(
                    f"{self.path} has fused queries, keys and values, and head_count={heads}, "
                    f"head_count_kv={kv_heads}, expected whole numbers"
                )
        assert isinstance(heads, int)
        assert isinstance(kv_heads, int)
        return heads, kv_heads, kv_heads

    def _split(
        self, name: str, fused: str, parts: Sequence[str], shares: Sequence[int], *, axis: int
    ) -> None:
        shape = self._shapes.pop(name)
        unit, rest = divmod(shape[axis], sum(shares))
        names = [name.replace(fused, part) for part in parts]
        beside = [part for part in names if part in self._file.shapes]
        if rest or beside:
            raise UserError(
                f"{self.path} has {name} of shape {shape}, expected a multiple of {sum(shares)} "
                f"rows, and neither of {', '.join(names)} beside it"
            )
        first = 0
        for part, share in zip(names, shares, strict=True):
            self._parts[part] = Part(name, first, share * unit)
            self._shapes[part] = (*shape[:axis], share * unit, *shape[axis + 1 :])
            first += share * unit

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file(self, name: str) -> Path:
        return self._file.file(self._parts[name].fused if name in self._parts else name)

    def read(self, name: str) -> np.ndarray:
        return self.read_rows(name, 0, self._shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The places [start, stop) of the first dim; of experts' parts expert by expert."""
        if name.endswith(GATE_ROW):
            return self._file.read(name).reshape(self._shapes[name])[start:stop]
        if name not in self._parts:
            return self._file.read_rows(name, start, stop)
        part, shape = self._parts[name], self._shapes[name]
        if EXPERTS not in part.fused:
            return self._file.read_rows(part.fused, part.first + start, part.first + stop)
        if len(shape) == 2:
            rows = self._file.read_rows(part.fused, start, stop)
            return rows[:, part.first : part.first + part.count]
        out = np.empty((stop - start, *shape[1:]), np.float32)
        rows = self._file.shapes[part.fused][1]
        for expert_FD, e in zip(out, range(start, stop), strict=True):
            first = e * rows + part.first
            expert_FD[...] = self._file.read_matrix(part.fused, first, first + part.count)
        return out
