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
from checkpoint.weight_map import (
    NOT_EXPORTED,
    Entry,
    Place,
    Span,
    by_tensor,
    flatten,
    leaf_name,
    place_index,
    whole_tensor,
)
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

    def part(self, place: Place) -> np.ndarray:
        """What lies at an entry's place.

        Raises:
          UserError: a tensor is damaged.
        """
        window = tuple(_range(at, size) for at, size in zip(place, self.shape, strict=True))
        part = _load_window(self.entries, self.tensors, window, self.dtype)
        dims = zip(place, window, strict=True)
        return part.reshape([stop - start for at, (start, stop) in dims if not isinstance(at, int)])


def _range(at: int | Span | None, size: int) -> tuple[int, int]:
    """The places of a dim of this size that a part has."""
    if at is None:
        return 0, size
    return (at, at + 1) if isinstance(at, int) else (at.start, at.stop)


def part_of(leaf: Any, place: Place) -> np.ndarray:
    """The part of a parameter at an entry's place, whether it is an array, a `LazyParameter` or one
    in codes (checkpoint/rounded.py).
    """
    if isinstance(leaf, LazyParameter | RoundedParameter | StackedParameters):
        return leaf.part(place)
    return np.asarray(leaf)[place_index(place)]


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
    out = own_pages([stop - start for start, stop in window], np.dtype(dtype))
    if not entries:  # state that public checkpoints don't hold (NOT_EXPORTED)
        out[...] = 0
    for entry in entries:
        ranges = [_range(at, stop) for at, (_, stop) in zip(entry.place, window, strict=True)]
        pairs = zip(ranges, window, strict=True)
        if any(first >= stop or last <= start for (first, last), (start, stop) in pairs):
            continue
        if not entry.is_sliceable:
            tensor = tensors.read(entry.name)
            tensor = tensor if entry.public_rows is None else tensor[entry.public_rows]
            _put(entry.to_parameter(tensor), entry, None, out, window)
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
    dims = zip(entry.place, window, strict=True)
    at, (start, stop) = [pair for pair in dims if not isinstance(pair[0], int)][dim]
    first, last = _range(at, stop)
    return max(start - first, 0), min(stop, last) - first


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
        if isinstance(at, int):
            target.append(at - start)
            continue
        first = 0 if at is None else at.start
        first += moved[1] if moved is not None and moved[0] == dim else 0
        last = first + part.shape[dim]
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return
        source.append(slice(low - first, high - first))
        target.append(slice(low - start, high - start))
        dim += 1
    out[tuple(target)] = part[tuple(source)]


def own_pages(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
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
    """Each public tensor's entry (weight_map.whole_tensor) and the tensor, in order; None for a
    tensor that is done.

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
    for name, sharing in by_tensor(entries).items():
        whole = whole_tensor(sharing)
        if is_done(name):
            yield whole, None
            continue
        yield whole, public_tensor(sharing, leaves)


def public_tensor(sharing: Sequence[Entry], leaves: Mapping[str, Any]) -> np.ndarray:
    """The tensor of these entries, which share its rows.

    Args:
      leaves: the model's variables by path.
    """
    parts = [entry.to_public(part_of(leaves[entry.leaf], entry.place)) for entry in sharing]
    if len(parts) == 1:
        return parts[0]
    out = np.empty(whole_tensor(sharing).shape, parts[0].dtype)
    for entry, part in zip(sharing, parts, strict=True):
        out[entry.public_rows] = part
    return out
