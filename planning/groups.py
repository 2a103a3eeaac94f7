"""Device groups of a collective, as XLA's text has them and as mesh axes give them."""

import math
import re
from itertools import combinations

import numpy as np
from jax.sharding import AbstractMesh, Mesh

Groups = frozenset[frozenset[int]]
"""Devices by their place in the mesh, counted row by row."""


def read_groups(attributes: str, num_devices: int) -> Groups:
    """The groups in a collective's attributes, which XLA writes in one of four ways:

        replica_groups={{0,1},{2,3}}              listed; {} is everyone
        replica_groups=[2,2]<=[2,2]T(1,0)         rows of a transposed count, T only where needed
        replica_groups=mesh['a'=2,'b'=2] {'b'}    along axes of XLA's mesh, whose devices may be
            in another order: mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
        source_target_pairs={{0,1},{1,0}}         a permutation, here one group

    Raises:
      NotImplementedError: another way.
    """
    pairs = re.search(r"source_target_pairs={(.*?)}}", attributes)
    if pairs:
        return frozenset({frozenset(int(n) for n in re.findall(r"\d+", pairs[1]))})
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source, order = iota.groups()
        return _rows(_counted(source, order).reshape(_numbers(shape)))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? {([^}]*)}",
        attributes,
    )
    if mesh:
        axes, source, order, along = mesh.groups()
        return _along_axes(axes, along, None if source is None else _counted(source, order))
    listed = re.search(r"replica_groups={((?:{[\d,]*},?)*)}", attributes)
    if listed is None:
        raise NotImplementedError(
            "a collective's groups are written in a way that planning/groups.py doesn't know: "
            f"{attributes[:200]!r}"
        )
    rows = re.findall(r"{([\d,]+)}", listed[1])
    groups = frozenset(frozenset(int(n) for n in row.split(",")) for row in rows)
    return groups or frozenset({frozenset(range(num_devices))})


def _counted(source: str, order: str | None) -> np.ndarray:
    """Devices counted in the shape `source`, transposed by `order`."""
    ids = np.arange(math.prod(_numbers(source))).reshape(_numbers(source))
    return ids if order is None else ids.transpose(_numbers(order))


def _along_axes(mesh: str, axes: str, ids: np.ndarray | None) -> Groups:
    """Devices of the mesh "'a'=2,'b'=8", along axes such as "'a','b':(2)4": all of a, and of b the
    part of size 4 that lies behind one of size 2.

    Args:
      ids: the devices in the mesh's order; None is the order of counting.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
    dims: list[int] = []
    grouped: list[int] = []
    named = re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axes)
    chosen = {n: (int(before or 1), int(size or sizes[n])) for n, before, size in named}
    if len(chosen) < len(named):
        raise NotImplementedError(f"two parts of one axis of XLA's mesh make a group: {axes}")
    for name, size in sizes.items():
        before, part = chosen.get(name, (1, 1))
        grouped += [len(dims) + 1] if name in chosen else []
        dims += [before, part, size // (before * part)]
    rest = [i for i in range(len(dims)) if i not in grouped]
    ids = np.arange(math.prod(dims)) if ids is None else ids
    ids = ids.reshape(dims).transpose(*rest, *grouped)
    return _rows(ids.reshape(-1, math.prod(dims[i] for i in grouped)))


def groups_by_axes(mesh: Mesh | AbstractMesh) -> dict[tuple[str, ...], Groups]:
    """The groups of each choice of mesh axes with more than one device."""
    sizes = tuple(mesh.shape.values())
    ids = np.arange(mesh.size).reshape(sizes)
    wide = [i for i, size in enumerate(sizes) if size > 1]
    found = {}
    for count in range(1, len(wide) + 1):
        for chosen in combinations(wide, count):
            rest = [i for i in range(ids.ndim) if i not in chosen]
            width = math.prod(sizes[i] for i in chosen)
            rows = ids.transpose(*rest, *chosen).reshape(-1, width)
            axes = tuple(mesh.axis_names[i] for i in chosen)
            found[axes] = _rows(rows)
    return found


def _rows(ids: np.ndarray) -> Groups:
    return frozenset(frozenset(map(int, row)) for row in ids)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
