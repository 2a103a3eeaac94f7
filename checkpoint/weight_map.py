"""Weight maps: which tensor of a public checkpoint lies where in a model's parameters.

A row of a table names a parameter, the public tensor, and how one becomes the other:

    Row("layers.*.attention.kv", "model.layers.*.self_attn.k_proj.weight", "(g c) d -> d 0 g c")

The pattern's left side has the public tensor's dims, letters in brackets side by side in one dim;
the right side has the parameter's: a digit is a fixed place of a dim (keys are part 0 of `kv`), and
a letter that the left side lacks is counted through, each value giving a tensor of its own, whose
number stands for {letter} in the name; one that the right side lacks is a dim of size 1. `*` is the
layer's number in both names. Sizes come from the parameters' shapes, so a table holds for every
size of its family, is read in both directions, and a
row whose parameter a layer lacks (no experts, no bias) is passed over for it.

A public tensor may hold several parameters (Row.rows says which of its rows are whose), and a
parameter may lie in several tensors one after the other (Row.span).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError

Order = Callable[[int, LayerSpec], np.ndarray]
"""(entries of the dim c, the layer) -> the public place of each of our entries, int [C]."""

Rows = Callable[[LayerSpec], np.ndarray]
"""The layer -> the rows of a public tensor that a parameter is made of, in the parameter's order,
int [N]."""


@dataclass(frozen=True)
class Values:
    """Numbers that a public tensor holds otherwise than the parameter does, one by one."""

    write: Callable[[np.ndarray], np.ndarray]
    """The tensor's for the parameter's, float32."""
    read: Callable[[np.ndarray], np.ndarray]
    """The inverse; what no parameter makes becomes NaN."""


class Span(NamedTuple):
    """The entries [start, stop) of a dim."""

    start: int
    stop: int


Place = tuple[int | Span | None, ...]
"""Of a part of a parameter: an index for dims that it has one place of, a span for those that it
has some of, None for whole ones."""


TOKEN_EXPERTS = ".token_experts"
"""State that public checkpoints hold as integers: the table of a router that goes by token."""
NOT_EXPORTED = ".null_logit"
"""State that public checkpoints don't hold: 0 where a model has no null experts."""


@dataclass(frozen=True)
class Row:
    """One kind of tensor."""

    parameter: str
    name: str
    pattern: str
    order: Order | None = None
    """How the entries along c are ordered anew (rotary pairs); None leaves them."""
    requires: str | None = None
    """A parameter of the same layer that must be there for this row to hold."""
    unless: str | None = None
    """One that must not."""
    rows: Rows | None = None
    """Those of the tensor that are meant, where other rows of the table take the rest; the pattern
    is about them alone."""
    span: Callable[[LayerSpec], Span] | None = None
    """The entries along n that the tensor fills, where other tensors fill the rest."""
    values: Values | None = None
    """How the tensor holds its numbers; None: as the parameter does."""
    lines: Callable[[LayerSpec], int] | None = None
    """In how many rows the tensor holds the one dim that the pattern gives it."""


@dataclass(frozen=True)
class Entry:
    """One public tensor, or some of its rows, and the part of a parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    """Of the public tensor, or of the rows that are meant."""
    leaf: str
    """The parameter's path in the variables: "params.periods.layer_0.attention.kv"."""
    place: Place
    split: tuple[int, ...]
    """The public shape with its brackets resolved."""
    axes: tuple[int, ...]
    """Which dim of `split` each whole dim of the parameter is."""
    order: np.ndarray | None
    order_axis: int = 0
    """Whole dim that `order` is about."""
    public_rows: np.ndarray | None = None
    """Which of the public tensor's rows are meant, int [N]; None: all of them."""
    values: Values | None = None

    @property
    def is_partial(self) -> bool:
        """Whether tensor and part are not whole: see Row.rows and Row.span."""
        return self.public_rows is not None or any(isinstance(at, Span) for at in self.place)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the whole dims, as `to_parameter` gives them."""
        return tuple(self.split[axis] for axis in self.axes)

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """The part as the parameter has it; a view where nothing changes.

        Raises:
          UserError: numbers that no parameter makes.
        """
        part = tensor.reshape(self.split).transpose(self.axes)
        if self.order is not None:
            part = part.take(self.order, axis=self.order_axis)
        if self.values is None:
            return part
        part = self.values.read(part)
        if np.isnan(part).any():
            raise UserError(f"{self.name} holds numbers that no model's tensor of this name has")
        return part

    def to_public(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_parameter`, contiguous."""
        if self.order is not None:
            part = part.take(np.argsort(self.order), axis=self.order_axis)
        if self.values is not None:
            part = self.values.write(part)
        return np.ascontiguousarray(part.transpose(np.argsort(self.axes))).reshape(self.shape)

    @property
    def is_sliceable(self) -> bool:
        """Whether rows of the public tensor are slices of the part: `rows` may be asked for."""
        is_whole = self.public_rows is None and self.split[0] == self.shape[0]
        return len(self.shape) > 1 and is_whole and not self._orders_rows

    @property
    def _orders_rows(self) -> bool:
        return self.order is not None and self.axes[self.order_axis] == 0

    def rows(self, start: int, stop: int) -> tuple["Entry", int]:
        """The entry of the public tensor's rows [start, stop), and the dim of the part that they
        are a slice of.
        """
        shape = (stop - start, *self.shape[1:])
        split = (stop - start, *self.split[1:])
        return dataclasses.replace(self, shape=shape, split=split), self.axes.index(0)


def interleaved(width: str) -> Order:
    """The last `width` entries of c are rotary pairs side by side (x0 y0 x1 y1 ...) in the public
    tensor and half-split (x0 x1 ... y0 y1 ...) in ours: the same turn, an order apart.

    Args:
      width: the attention's setting that counts them: "rope_head_dim", "head_dim".
    """

    def order(size: int, layer: LayerSpec) -> np.ndarray:
        count = getattr(layer.attention, width)
        kept, pairs = np.arange(size - count), np.arange(size - count, size).reshape(-1, 2)
        return np.concatenate([kept, pairs[:, 0], pairs[:, 1]])

    return order


def interleaved_first(width: str) -> Order:
    """As `interleaved`, of the first entries of c."""

    def order(size: int, layer: LayerSpec) -> np.ndarray:
        count = getattr(layer.attention, width)
        pairs, kept = np.arange(count).reshape(-1, 2), np.arange(count, size)
        return np.concatenate([pairs[:, 0], pairs[:, 1], kept])

    return order


def swapped_halves(size: int, layer: LayerSpec) -> np.ndarray:
    """The second half of c first."""
    del layer
    return np.roll(np.arange(size), size // 2)


def flatten(variables: Any) -> dict[str, Any]:
    """The leaves of a tree of variables (or of their shapes) by path, "params.embedding"."""
    return {leaf_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def leaf_name(path: Any) -> str:
    """The path that jax gives a leaf, as one name."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def place_index(place: Place) -> tuple[int | slice, ...]:
    """The index of a part in its parameter."""
    return tuple(
        slice(None) if at is None else slice(*at) if isinstance(at, Span) else at for at in place
    )


def by_tensor(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each public tensor by its name: one, or those that share its rows."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.name, []).append(entry)
    return found


def whole_tensor(sharing: Sequence[Entry]) -> Entry:
    """The first of the entries that share a public tensor, with the tensor's shape."""
    if len(sharing) == 1:
        return sharing[0]
    rows = sum(entry.shape[0] for entry in sharing)
    return dataclasses.replace(sharing[0], shape=(rows, *sharing[0].shape[1:]))


def expand(rows: Sequence[Row], config: ModelConfig, shapes: dict[str, Any]) -> list[Entry]:
    """Every tensor that the table gives a model: what stands alone, then layer by layer.

    Args:
      shapes: the model's variables by path (`flatten`), anything with a shape.
    Raises:
      UserError: parameters that no row fills: the family has no tensor for them.
    """
    entries = [e for row in rows if "*" not in row.parameter for e in _entries(row, shapes)]
    for layer in _layers(config):
        for row in rows:
            path = layer.paths.get(row.parameter.split("*")[0])
            if path is None:
                continue
            entries += _entries(_numbered(row, layer.number, path), shapes, layer)
    _check_cover(entries, shapes)
    return entries


def _numbered(row: Row, number: int, path: str) -> Row:
    """The row of one layer, whose parameters lie at `path`."""

    def at_path(parameter: str | None) -> str | None:
        return None if parameter is None else f"{path}.{parameter.split('*.')[1]}"

    return dataclasses.replace(
        row,
        parameter=f"{path}.{row.parameter.split('*.')[1]}",
        name=row.name.replace("*", str(number)),
        requires=at_path(row.requires),
        unless=at_path(row.unless),
    )


@dataclass(frozen=True)
class _Layer:
    number: int
    paths: dict[str, str]
    """Where its parameters lie, by what a row's parameter begins with."""
    period: int | None
    """Its place in the stack; None if it lies alone."""
    spec: LayerSpec


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    for i, spec in enumerate(config.prefix):
        yield _Layer(i, {"layers.": f"prefix_{i}"}, None, spec)
    for i in range(len(config.prefix), config.num_layers):
        period, place = divmod(i - len(config.prefix), len(config.pattern))
        yield _Layer(i, {"layers.": f"periods.layer_{place}"}, period, config.pattern[place])
    if config.multi_token is not None:
        for k in range(config.multi_token.depth):
            paths = {"layers.": f"multi_token_{k}.layer", "multi_token.": f"multi_token_{k}"}
            yield _Layer(config.num_layers + k, paths, None, config.multi_token.layer)


def _entries(row: Row, shapes: dict[str, Any], layer: _Layer | None = None) -> Iterator[Entry]:
    """The tensors of a row whose parameter is known; none where the model lacks it."""
    leaf = _leaf(row.parameter, shapes)
    is_barred = row.unless is not None and _leaf(row.unless, shapes) is not None
    is_alone = row.requires is not None and _leaf(row.requires, shapes) is None
    if leaf is None or is_barred or is_alone:
        return
    left, right = (side.strip() for side in row.pattern.split("->"))
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", left)]
    ours = right.split()
    public = [letter for letter in itertools.chain(*groups) if letter in ours]
    stack = () if layer is None or layer.period is None else (layer.period,)
    dims = shapes[leaf].shape[len(stack) :]
    assert len(dims) == len(ours), f"{row.pattern} is not the form of {leaf}, {dims}"
    sizes = dict(zip(ours, dims, strict=True))
    public_rows, span = None, None
    if layer is not None and row.rows is not None:
        public_rows = row.rows(layer.spec)
    if layer is not None and row.span is not None:
        span = row.span(layer.spec)
        sizes["n"] = span.stop - span.start
    counted = [letter for letter in ours if not letter.isdigit() and letter not in public]
    kept = [letter for letter in ours if letter in public]
    order = None
    if row.order is not None:
        assert layer is not None, f"{row.name}: an order needs its layer"
        order = row.order(sizes["c"], layer.spec)
    for numbers in itertools.product(*(range(sizes[letter]) for letter in counted)):
        chosen = dict(zip(counted, numbers, strict=True))
        shape = tuple(math.prod(sizes.get(letter, 1) for letter in group) for group in groups)
        if row.lines is not None:
            assert layer is not None
            count = row.lines(layer.spec)
            shape = (count, shape[0] // count)
        place = (
            int(x) if x.isdigit() else span if x == "n" and span else chosen.get(x) for x in ours
        )
        yield Entry(
            name=row.name.format(**chosen) if chosen else row.name,
            shape=shape,
            leaf=leaf,
            place=(*stack, *place),
            split=tuple(sizes[letter] for letter in public),
            axes=tuple(public.index(letter) for letter in kept),
            order=order,
            order_axis=kept.index("c") if order is not None else 0,
            public_rows=public_rows,
            values=row.values,
        )


def _leaf(parameter: str, shapes: dict[str, Any]) -> str | None:
    """The path of a parameter, or of router state; None where the model lacks it."""
    paths = (f"params.{parameter}", f"router_state.{parameter}")
    return next((path for path in paths if path in shapes), None)


def _check_cover(entries: Sequence[Entry], shapes: dict[str, Any]) -> None:
    """Every parameter is filled, every part of it once."""
    filled: dict[str, int] = dict.fromkeys(shapes, 0)
    places = set()
    for entry in entries:
        filled[entry.leaf] += math.prod(entry.shape)
        assert (entry.leaf, entry.place) not in places, f"{entry.name} fills what another fills"
        places.add((entry.leaf, entry.place))
    short = [
        leaf
        for leaf, count in filled.items()
        if count != math.prod(shapes[leaf].shape) and not leaf.endswith(NOT_EXPORTED)
    ]
    if short:
        raise UserError(
            f"this family has no tensors for {len(short)} parameters of the model, the first is "
            f"{short[0]}: choose a family that has them, or keep the model as a run directory"
        )
