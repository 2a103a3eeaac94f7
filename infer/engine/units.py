"""What is kept of a prefix, as bytes: pages, or the state of one sequence.

N pages copied at a time.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np

from infer import steps
from infer.kept_programs import KeptPrograms
from model.model_state import (
    ModelState,
    put_pages,
    put_rows,
    take_pages,
    take_rows,
    without_pages,
)

COPIED_PAGES = 4
"""Pages that a program copies at a time, N; places that are not needed are of page 0."""


class Pages:
    """Contents of pages out of a state, and into it."""

    def __init__(self, state: ModelState) -> None:
        shapes = jax.eval_shape(take_pages, state, np.zeros(COPIED_PAGES, np.int32))
        self._shapes = [(x.shape[1:], np.dtype(x.dtype)) for x in shapes]
        self._kept = KeptPrograms()

    def copy_out(self, state: ModelState, pages: list[int]) -> list[bytes]:
        """The contents of each page."""
        units: list[bytes] = []
        for first in range(0, len(pages), COPIED_PAGES):
            some = pages[first : first + COPIED_PAGES]
            arrays = jax.device_get(self._kept.run(_take_pages, state, _padded(some)))
            units += [b"".join(x[i].tobytes() for x in arrays) for i in range(len(some))]
        return units

    def copy_in(self, state: ModelState, pages: list[int], units: list[bytes]) -> ModelState:
        """The state with these contents in these pages."""
        for first in range(0, len(pages), COPIED_PAGES):
            some = [_arrays(unit, self._shapes) for unit in units[first : first + COPIED_PAGES]]
            blank = [np.zeros(shape, dtype) for shape, dtype in self._shapes]
            some += [blank] * (COPIED_PAGES - len(some))
            arrays = tuple(np.stack(parts) for parts in zip(*some, strict=True))
            at_N = _padded(pages[first : first + COPIED_PAGES])
            state = self._kept.run(_put_pages, state, at_N, arrays)
        return state


class Rows:
    """What rows hold of one sequence."""

    def __init__(self, state: ModelState) -> None:
        kept = jax.eval_shape(take_row, state, np.zeros(1, np.int32))
        leaves, self._tree = jax.tree.flatten(kept)
        self._shapes = [(x.shape, np.dtype(x.dtype)) for x in leaves]

    def to_bytes(self, kept: ModelState) -> bytes:
        return b"".join(np.asarray(x).tobytes() for x in jax.device_get(jax.tree.leaves(kept)))

    def from_bytes(self, unit: bytes) -> ModelState:
        return jax.tree.unflatten(self._tree, _arrays(unit, self._shapes))


@jax.jit
def take_row(state: ModelState, row_1: jax.Array) -> ModelState:
    """What one row holds, without pages."""
    return take_rows(without_pages(state), row_1)


_take_pages = jax.jit(take_pages)


@partial(jax.jit, donate_argnums=0)
def put_row(state: ModelState, row_1: jax.Array, kept: ModelState) -> ModelState:
    """The state with one row's replaced."""
    return steps.laid_out(put_rows(state, row_1, kept))


@partial(jax.jit, donate_argnums=0)
def _put_pages(state: ModelState, pages_N: jax.Array, arrays: Any) -> ModelState:
    return steps.laid_out(put_pages(state, pages_N, arrays))


def _padded(pages: list[int]) -> np.ndarray:
    return np.array([*pages, *[0] * (COPIED_PAGES - len(pages))], np.int32)


def _arrays(unit: bytes, shapes: list[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """
    Raises:
      ValueError: bytes of another length.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    if len(unit) != sum(sizes):
        raise ValueError(f"a kept prefix has {len(unit)} bytes, {sum(sizes)} are needed")
    arrays, begin = [], 0
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        flat = np.frombuffer(unit, dtype, math.prod(shape), begin)
        arrays.append(flat.reshape(shape))
        begin += size
    return arrays
