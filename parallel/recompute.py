"""Work that the backward pass does again, rather than keep what came of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def recomputed(
    work: Callable[..., jax.Array], kept: tuple[str, ...] = ()
) -> Callable[..., jax.Array]:
    """The same function of trees of arrays. For its gradient nothing is kept but what goes in, and
    what it names so (jax.ad_checkpoint.checkpoint_name).

    It is jax.checkpoint with a barrier of its own: XLA's compiler for the CPU takes the usual one
    away before it looks for what is computed twice, and nothing would be computed again where
    layers are not in a loop. What goes in is read again, too: a layer's slice of stacked weights
    need not lie there until its gradient is due.
    """
    names = jax.checkpoint_policies.save_only_these_names(*kept)
    again = jax.checkpoint(work, policy=names, prevent_cse=False)
    barrier = _times_one if _is_on_one_device() else _barrier

    def backward(pullback: Any, dy: jax.Array) -> Any:
        return lax.platform_dependent(dy, pullback, cpu=barrier, default=_barrier)(dy)

    differentiable = jax.custom_vjp(work)
    differentiable.defvjp(lambda *operands: jax.vjp(again, *operands), backward)
    return differentiable


def _is_on_one_device() -> bool:
    """Whether arrays are what one device holds: without a mesh, or inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual


def _barrier(first: jax.Array, tree: Any) -> Any:
    """The arrays of a tree; to the compiler they are others, made once `first` is."""
    return lax.optimization_barrier((first, tree))[1]


def _times_one(first: jax.Array, tree: Any) -> Any:
    """The arrays times a one, or plus a zero, which the compiler can't know to be that."""
    bits = lax.bitcast_convert_type(first.ravel()[0].astype(jnp.float32), jnp.uint32)
    zero = (bits >> 31) >> 1

    def same(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x * (1 + zero).astype(x.dtype)
        return x + zero.astype(x.dtype)

    return jax.tree.map(same, tree)
