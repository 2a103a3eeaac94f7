"""Variables from a public checkpoint's tensors, and tensors from variables, one at a time.

Loading goes leaf by leaf and shard by shard: each local device's part of a parameter is filled from
the tensors that it holds and handed over, so that the host holds the result (on CPU) or one shard
of one parameter (on GPU), and a piece of one tensor. A conversion needs no whole model: `unread`
parameters are read part by part, as the tensors to write ask for them.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from checkpoint.families.base import Copy
from checkpoint.rounded import RoundedParameter, StackedParameters
from checkpoint.weight_map import NOT_EXPORTED, Entry, flatten, leaf_name
from configs.architecture import ModelConfig
from configs.checks import UserError

PIECE_BYTES = 64 * 2**20
"""Of float32 that a tensor is read in at a time, where its first dim allows it."""

HUGE_FROM = 4 * 2**20
"""Bytes of an array from which pages of 2 MiB waste little."""

Progress = Callable[[int], None]
"""Called with the number of elements read since the last call."""

Convert = Callable[[Any, jax.Array], Any]
"""See `load`."""


class Tensors(Protocol):
    """A checkpoint's tensors as numbers, whatever it holds them in."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray:
        """Float32, finite; UserError naming the tensor where it is not."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The places [start, stop) of its first dim."""
        ...

    def file(self, name: str) -> Path: ...


def pieces(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of [first, last) of the first dim, each of about PIECE_BYTES in float32."""
    row = 4 * math.prod(shape[1:])
    step = max(PIECE_BYTES // max(row, 1), 1)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def load(
    entries: Sequence[Entry],
    tensors: Tensors,
    abstract_variables: Any,
    progress: Progress = lambda _: None,
    convert: Convert = lambda _, x: x,
) -> Any:
    """The variables, laid out and typed as the abstract ones.

    Args:
      abstract_variables: ShapeDtypeStructs with shardings.
      convert: (path, variable) to what stands in its place, called as soon as it is read: into a
        format of few bits, so that only one variable at a time is there in floats.
    """
    by_leaf = _by_leaf(entries, abstract_variables)

    def load_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        made = convert(path, _load_leaf(by_leaf[leaf_name(path)], tensors, leaf, progress))
        # Waited for: reading is faster than rounding, and what waits to be rounded is in floats.
        return jax.block_until_ready(made)

    return jax.tree_util.tree_map_with_path(load_leaf, abstract_variables)


def unread(entries: Sequence[Entry], tensors: Tensors, abstract_variables: Any) -> Any:
    """The same tree with a `LazyParameter` for each array."""
    by_leaf = _by_leaf(entries, abstract_variables)

    def lazy(path: Any, leaf: jax.ShapeDtypeStruct) -> LazyParameter:
        return LazyParameter(by_leaf[leaf_name(path)], tensors, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(lazy, abstract_variables)


def _by_leaf(entries: Sequence[Entry], abstract_variables: Any) -> dict[str, list[Entry]]:
    by_leaf: dict[str, list[Entry]] = {leaf: [] for leaf in flatten(abstract_variables)}
    for entry in entries:
        by_leaf[entry.leaf].append(entry)
    return by_leaf


Window = tuple[tuple[int, int], ...]
"""A part of a parameter, such as a device holds: (start, stop) of each dim."""


@dataclass(frozen=True)
class LazyParameter:
    """A parameter that is read from its checkpoint on demand."""

    entries: Sequence[Entry]
    """Those that fill it."""
    tensors: Tensors
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def part(self, place: tuple[int | None, ...]) -> np.ndarray:
        """What lies at an entry's place: see `Entry.place`.

        Raises:
          UserError: a tensor is damaged.
        """
        sizes = zip(place, self.shape, strict=True)
        window = tuple((0, size) if at is None else (at, at + 1) for at, size in sizes)
        part = _load_window(self.entries, self.tensors, window, self.dtype)
        return part.reshape(
            [size for at, size in zip(place, self.shape, strict=True) if at is None]
        )


def part_of(leaf: Any, place: tuple[int | None, ...]) -> np.ndarray:
    """The part of a parameter at an entry's place, whether it is an array, a `LazyParameter` or one
    in codes (checkpoint/rounded.py).
    """
    if isinstance(leaf, LazyParameter | RoundedParameter | StackedParameters):
        return leaf.part(place)
    return np.asarray(leaf)[tuple(slice(None) if at is None else at for at in place)]


def _load_leaf(
    entries: list[Entry], tensors: Tensors, leaf: jax.ShapeDtypeStruct, progress: Progress
) -> jax.Array:
    sharding: Any = leaf.sharding
    made: dict[Window, np.ndarray] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        ranges = (part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        window = tuple(ranges)
        if window not in made:
            made[window] = _load_window(entries, tensors, window, leaf.dtype, progress)
        shards.append(jax.device_put(made[window], device))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _load_window(
    entries: Sequence[Entry],
    tensors: Tensors,
    window: Window,
    dtype: Any,
    progress: Progress = lambda _: None,
) -> np.ndarray:
    out = _aligned([stop - start for start, stop in window], np.dtype(dtype))
    if not entries:  # state that public checkpoints don't hold (NOT_EXPORTED)
        out[...] = 0
    for entry in entries:
        inside = zip(entry.place, window, strict=True)
        if any(at is not None and not start <= at < stop for at, (start, stop) in inside):
            continue
        if not entry.is_sliceable:
            _put(entry.to_parameter(tensors.read(entry.name)), entry, None, out, window)
        else:
            for start, stop in pieces(entry.shape, *_rows_inside(entry, window)):
                piece, dim = entry.rows(start, stop)
                rows = tensors.read_rows(entry.name, start, stop)
                _put(piece.to_parameter(rows), piece, (dim, start), out, window)
        progress(math.prod(entry.shape))
    return out


def _rows_inside(entry: Entry, window: Window) -> tuple[int, int]:
    """Which of the public tensor's rows lie in the window."""
    _, dim = entry.rows(0, entry.shape[0])
    whole = [ranges for at, ranges in zip(entry.place, window, strict=True) if at is None]
    return whole[dim]


def _put(
    part: np.ndarray,
    entry: Entry,
    moved: tuple[int, int] | None,
    out: np.ndarray,
    window: Window,
) -> None:
    """Writes what of the part lies in the window.

    Args:
      moved: (dim of the part, its first place there) for a piece of a tensor.
    """
    source, target, dim = [], [], 0
    for at, (start, stop) in zip(entry.place, window, strict=True):
        if at is not None:
            target.append(at - start)
            continue
        first = moved[1] if moved is not None and moved[0] == dim else 0
        last = first + part.shape[dim]
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return
        source.append(slice(low - first, high - first))
        target.append(slice(low - start, high - start))
        dim += 1
    out[tuple(target)] = part[tuple(source)]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that XLA on CPU can take over without a copy, at the start of a page.

    Of the system's own pages, which go back to it when the array is gone: of what malloc gave it
    keeps some tens of megabytes for later. Large arrays ask for huge pages, as numpy's do: weights
    are read again for every token.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


def written_copies(
    entries: Sequence[Entry], copies: Sequence[Copy], config: ModelConfig
) -> list[Entry]:
    """Entries of the tensors that public checkpoints repeat for each multi-token module."""
    if config.multi_token is None:
        return []
    by_name = {entry.name: entry for entry in entries}
    if config.tie_embeddings:
        by_name["lm_head.weight"] = by_name["model.embed_tokens.weight"]
    return [
        dataclasses.replace(by_name[copy.of], name=copy.name.replace("*", str(number)))
        for number in range(config.num_layers, config.num_layers + config.multi_token.depth)
        for copy in copies
        if copy.is_written
    ]


def saved(
    entries: Sequence[Entry], variables: Any, is_done: Callable[[str], bool]
) -> Iterator[tuple[Entry, np.ndarray | None]]:
    """Each entry and its tensor, in order; None for a tensor that is done.

    Raises:
      UserError: state that public checkpoints don't hold is not 0.
    """
    leaves = flatten(variables)
    for name, leaf in leaves.items():
        if name.endswith(NOT_EXPORTED) and part_of(leaf, (None,) * len(leaf.shape)).any():
            raise UserError(
                f"{name} is not 0, and no public family has null experts: keep the model as a run "
                "directory"
            )
    for entry in entries:
        if is_done(entry.name):
            yield entry, None
            continue
        yield entry, entry.to_public(part_of(leaves[entry.leaf], entry.place))
