"""One table from logical axes of arrays to mesh axes, and what follows from it.

Every parameter names its dimensions (see `model/`); this table says over which mesh axis each is
split. Changing the strategy means changing the table.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from configs.checks import UserError
from parallel.mesh import BATCH_AXES, DATA, EXPERT, TENSOR, axis_sizes

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,  # rows of the batch
    "length": None,
    "embed": DATA,  # d_model of parameters: FSDP, gathered where used
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "latent": None,
    "mlp": TENSOR,
    "expert": EXPERT,
    "vocab": TENSOR,
    "layers": None,  # periods stacked for the scan
}

LogicalAxes = Sequence[str | None]


def partition_spec(logical_axes: LogicalAxes) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these names (None: not split).

    Raises:
      ValueError: an unknown name, or two dimensions that the table puts on the same mesh axis.
    """
    entries, used = [], {}
    for name in logical_axes:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; the table has {sorted(RULES)}")
        entry = None if name is None else RULES[name]
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in used:
                raise ValueError(
                    f"dimensions {used[axis]!r} and {name!r} of {tuple(logical_axes)} both map "
                    "to the mesh axis "
                    f"{axis!r}: an array can use each mesh axis once, change the table in "
                    "parallel/sharding.py"
                )
            used[axis] = name
        entries.append(entry)
    return PartitionSpec(*entries)


def named_sharding(
    mesh: Mesh | AbstractMesh, logical_axes: LogicalAxes, shape: Sequence[int], name: str
) -> NamedSharding:
    """The sharding of one array, checked against its shape.

    Raises:
      UserError: a dimension that its mesh axes do not divide.
    """
    spec = partition_spec(logical_axes)
    for size, entry, axis_name in zip(shape, spec, logical_axes, strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise UserError(
                f"{name} has {size} along {axis_name!r}, which must be divisible by the mesh "
                f"axes {axes} "
                f"(size {shards}): change the mesh or the model"
            )
    return NamedSharding(mesh, spec)


def tree_shardings(mesh: Mesh | AbstractMesh, logical_axes: Any, abstract: Any) -> Any:
    """`named_sharding` for a tree of arrays or ShapeDtypeStructs and the matching tree of names."""

    def shard(path, array, axes):
        return named_sharding(
            mesh, axes, array.shape, jax.tree_util.keystr(path, simple=True, separator=".")
        )

    return jax.tree_util.tree_map_with_path(shard, abstract, logical_axes)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """x laid out by the table; unchanged without a mesh. A layout, never a value.

    Dimensions that their mesh axes do not divide (a decode batch of one) stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = partition_spec(logical_axes)
    entries = [e if _divides(size, e) else None for size, e in zip(x.shape, spec, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def on_shards(
    fn: Callable[..., Any],
    operands: Sequence[jax.Array],
    axes: Sequence[LogicalAxes],
    out_axes: Any,
) -> Any:
    """fn(*operands), each device computing its own part; for what XLA can't split itself, as
    kernels that aren't XLA's.

    Args:
      fn: independent along every dimension that the table splits: parts of the operands give that
        part of the result.
      axes: logical axes of each operand; where a mesh axis does not divide a dimension (a decode
        batch of one), every device computes the whole.
      out_axes: of the result, or a list of those of each array of a tuple.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(*operands)
    specs = tuple(partition_spec(names) for names in axes)
    for operand, spec in zip(operands, specs, strict=True):
        if not all(map(_divides, operand.shape, spec)):
            return fn(*operands)
    is_tuple = isinstance(out_axes, list)
    out_specs = tuple(map(partition_spec, out_axes)) if is_tuple else partition_spec(out_axes)
    # Kernels that aren't XLA's say nothing of what varies over devices.
    return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, check_vma=False)(*operands)


def on_parts(
    fn: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    parts: Any,
    x_axes: LogicalAxes,
    out_axes: LogicalAxes,
    *,
    is_sum: bool,
) -> jax.Array:
    """fn(x, parts) of a weight that lies in parts on the mesh axis "tensor", each device with its
    own.

    Args:
      parts: a tree of arrays whose dim 0 is the parts.
      x_axes, out_axes: logical axes of x and of the result; a batch that does not divide is whole.
      is_sum: the devices' results are parts of a sum, and not of an array.
    Raises:
      ValueError: the mesh in use is not the one that the parts were made for.
    """
    count, devices = jax.tree.leaves(parts)[0].shape[0], axis_sizes()[TENSOR]
    if count != devices:
        raise ValueError(
            f"a weight in {count} parts needs as many devices along {TENSOR!r}, the mesh in use "
            f"has {devices}: set the one that it was loaded onto"
        )
    whole = {None} if _divides(x.shape[0], BATCH_AXES) else {None, "batch"}

    def spec(axes: LogicalAxes) -> PartitionSpec:
        return partition_spec([None if axis in whole else axis for axis in axes])

    def own(x: jax.Array, parts: Any) -> jax.Array:
        y = fn(x, parts)
        return jax.lax.psum(y, TENSOR) if is_sum else y

    in_specs = (spec(x_axes), PartitionSpec(TENSOR))
    return jax.shard_map(own, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False)(
        x, parts
    )


def _divides(size: int, entry: str | tuple[str, ...] | None) -> bool:
    """Whether the mesh axes of a dimension divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0
