"""Reading the tensors of a model in GGUF, llama.cpp's format, whatever they are quantised to."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import DTypeLike

from configs.checks import UserError
from formats.gguf.header import TensorPlace
from formats.gguf.split_files import read_model_header

_ENTRIES = 1 << 22
"""Decoded at once: what a read holds beside its result is a few copies of these in float32."""


class GGUFFile:
    """A model's metadata and tensors. Tensors are read when asked for, rows at a time, so memory
    holds the result and a few MB."""

    def __init__(self, path: Path) -> None:
        """
        Args:
          path: the file, or one of its parts.
        Raises:
          UserError: see `formats.gguf.split_files.read_model_header`.
        """
        self.path = path
        header = read_model_header(path)
        self.metadata: dict[str, Any] = header.metadata
        self._places = header.tensors
        self.shapes = {name: place.shape for name, place in header.tensors.items()}
        """Of every tensor, in numpy's order."""

    def file(self, name: str) -> Path:
        """Where the tensor lies, for sentences."""
        return self._places[name].file

    def kind(self, name: str) -> GGMLQuantizationType:
        return self._places[name].kind

    def read(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        """The whole tensor, decoded in float32 and rounded to dtype.

        Raises:
          UserError: a value that is not finite, or a type of which no decoder is known.
        """
        return self.read_rows(name, 0, self.shapes[name][0], dtype)

    def read_rows(
        self, name: str, start: int, stop: int, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """The tensor's entries [start, stop) along dim 0; the rest is not decoded.

        Raises:
          UserError: as in `read`.
        """
        place = self._places[name]
        assert 0 <= start <= stop <= place.shape[0]
        if len(place.shape) == 1:
            return self._decode(name, 0, 1, dtype)[0, start:stop]
        per_entry = math.prod(place.shape[1:-1])
        rows = self._decode(name, start * per_entry, stop * per_entry, dtype)
        return rows.reshape(stop - start, *place.shape[1:])

    def read_matrix(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the tensor seen as a matrix: all dims but the last are one."""
        return self._decode(name, start, stop, np.float32)

    def raw(self, name: str) -> tuple[np.ndarray, GGMLQuantizationType]:
        """The tensor as it lies in the file, uint8 [..., bytes of a row], and its type."""
        place = self._places[name]
        rows = self._bytes(name, 0, math.prod(place.shape[:-1]))
        return rows.reshape(*place.shape[:-1], place.row_bytes), place.kind

    def _decode(self, name: str, start: int, stop: int, dtype: DTypeLike) -> np.ndarray:
        """Rows of the tensor seen as a matrix, [stop - start, width]."""
        place = self._places[name]
        width = place.shape[-1]
        result = np.empty((stop - start, width), dtype)
        step = max(1, _ENTRIES // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = result[first - start : last - start]
            with np.errstate(all="ignore"):  # damaged scales are found below
                part[...] = self._dequantized(name, place, first, last)
                is_finite = np.isfinite(part).all()
            if not is_finite:
                raise UserError(
                    f"tensor {name!r} in {place.file} has values that are not finite as "
                    f"{np.dtype(dtype).name}: download the file again"
                )
        return result

    def _dequantized(self, name: str, place: TensorPlace, start: int, stop: int) -> np.ndarray:
        try:
            return dequantize(self._bytes(name, start, stop), place.kind)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {name!r} in {place.file} has the type {place.kind.name}, for which there "
                "is no decoder: choose a file with another quantisation"
            ) from error

    def _bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the file, uint8 [stop - start, bytes of a row]."""
        place = self._places[name]
        count = (stop - start) * place.row_bytes
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start + start * place.row_bytes)
            data = bytearray(count)
            view, done = memoryview(data), 0
            while done < count and (more := file.readinto(view[done:])):
                done += more
        if done < count:
            raise UserError(
                f"{place.file} became shorter while {name!r} was read: download it again"
            )
        return np.frombuffer(data, np.uint8).reshape(stop - start, place.row_bytes)
