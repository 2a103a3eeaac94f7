"""Variables from a public checkpoint's tensors, and tensors from variables, one at a time.

Loading goes leaf by leaf and shard by shard: each local device's part of a parameter is filled from
the tensors that it holds and handed over, so that the host holds the result (on CPU) or one shard
of one parameter (on GPU), and a piece of one tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from checkpoint.families.base import Copy
from checkpoint.tables import UNSAID, Entry, flatten
from configs.architecture import ModelConfig
from configs.checks import UserError

PIECE_BYTES = 64 * 2**20
"""Of float32 that a tensor is read in at a time, where its first dim allows it."""

ALIGNMENT = 64
"""Bytes to which XLA on CPU wants a buffer aligned to use it as it is, without a copy."""

Progress = Callable[[int], None]
"""Called with the number of elements read since the last call."""


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


def check_names(
    entries: Sequence[Entry],
    tensors: Tensors,
    copies: Sequence[tuple[str, str]],
    ignored: Sequence[str],
    where: Path,
) -> None:
    """Every tensor has a use, and every use its tensor, of the right shape: told by the headers,
    before anything is read.

    Args:
      copies: (tensor, the one it repeats); they need not be there.
      ignored: regular expressions.
    Raises:
      UserError: tensors that are missing, unknown, or of another shape.
    """
    expected = {entry.name: entry.shape for entry in entries}
    allowed = expected.keys() | {name for name, _ in copies}
    missing = [name for name in expected if name not in tensors.shapes]
    unknown = [
        name
        for name in tensors.shapes
        if name not in allowed and not any(re.fullmatch(rule, name) for rule in ignored)
    ]
    if missing or unknown:
        raise UserError(f"{where} does not fit its config: {_said(missing, unknown, tensors)}")
    for name, shape in expected.items():
        found = tuple(tensors.shapes[name])
        if found != shape:
            raise UserError(
                f"{tensors.file(name)}: {name} has the shape {list(found)}, its config asks for "
                f"{list(shape)}: config and tensors are of two models"
            )


def _said(missing: list[str], unknown: list[str], tensors: Tensors) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unknown:
        files = sorted({tensors.file(name).name for name in unknown[:100]})
        parts.append(
            f"{len(unknown)} tensors in {_some(files)} belong to nothing in the model "
            f"({_some(unknown)})"
        )
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def expanded_copies(copies: Sequence[Copy], tensors: Iterable[str]) -> list[tuple[str, str]]:
    """The copies among these tensors, (name, the one it repeats)."""
    rules = [(re.escape(copy.name).replace(r"\*", r"\d+"), copy.of) for copy in copies]
    return [(name, of) for name in tensors for rule, of in rules if re.fullmatch(rule, name)]


def check_copies(copies: Sequence[tuple[str, str]], tensors: Tensors) -> None:
    """
    Raises:
      UserError: a tensor that should repeat another one, and doesn't.
    """
    for name, of in copies:
        shape = tuple(tensors.shapes[name])
        same = of in tensors.shapes and tuple(tensors.shapes[of]) == shape
        for start, stop in _pieces(shape) if same else ():
            mine, other = (tensors.read_rows(each, start, stop) for each in (name, of))
            same = same and np.array_equal(mine, other)
        if not same:
            raise UserError(
                f"{tensors.file(name)}: {name} should repeat {of} and does not: a model with an "
                "output layer of its own there is not built"
            )


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of the first dim, each of about PIECE_BYTES in float32."""
    row = 4 * math.prod(shape[1:])
    step = max(PIECE_BYTES // max(row, 1), 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def load(
    entries: Sequence[Entry],
    tensors: Tensors,
    abstract_variables: Any,
    progress: Progress = lambda _: None,
) -> Any:
    """The variables, laid out and typed as the abstract ones.

    Args:
      abstract_variables: ShapeDtypeStructs with shardings.
    """
    by_leaf: dict[str, list[Entry]] = {leaf: [] for leaf in flatten(abstract_variables)}
    for entry in entries:
        by_leaf[entry.leaf].append(entry)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return _load_leaf(by_leaf[name], tensors, leaf, progress)

    return jax.tree_util.tree_map_with_path(one, abstract_variables)


Window = tuple[tuple[int, int], ...]
"""The part of a parameter that a device holds: (start, stop) of each dim."""


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
    entries: list[Entry], tensors: Tensors, window: Window, dtype: Any, progress: Progress
) -> np.ndarray:
    out = _aligned([stop - start for start, stop in window], np.dtype(dtype))
    if not entries:  # state that public checkpoints don't hold (UNSAID)
        out[...] = 0
    for entry in entries:
        inside = zip(entry.place, window, strict=True)
        if any(at is not None and not start <= at < stop for at, (start, stop) in inside):
            continue
        if not entry.is_sliceable:
            _put(entry.to_parameter(tensors.read(entry.name)), entry, None, out, window)
        else:
            for start, stop in _pieces(entry.shape):
                piece, dim = entry.rows(start, stop)
                rows = tensors.read_rows(entry.name, start, stop)
                _put(piece.to_parameter(rows), piece, (dim, start), out, window)
        progress(math.prod(entry.shape))
    return out


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
    """An array that XLA on CPU can take over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def written_copies(
    entries: Sequence[Entry], copies: Sequence[Copy], config: ModelConfig
) -> list[Entry]:
    """Entries of the tensors that public checkpoints repeat for each multi-token module."""
    if config.multi_token is None:
        return []
    by_name = {entry.name: entry for entry in entries}
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
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(variables).items()}
    for name, leaf in leaves.items():
        if name.endswith(UNSAID) and leaf.any():
            raise UserError(
                f"{name} is not 0, and no public family has null experts: keep the model as a run "
                "directory"
            )
    for entry in entries:
        if is_done(entry.name):
            yield entry, None
            continue
        place = tuple(slice(None) if at is None else at for at in entry.place)
        yield entry, entry.to_public(leaves[entry.leaf][place])


def count(entries: Iterable[Entry]) -> int:
    """Elements that `load` reads: the total for a progress bar, on one device."""
    return sum(math.prod(entry.shape) for entry in entries)
