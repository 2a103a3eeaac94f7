"""Carries tokens to the experts that were chosen for them, and the results back.

This file owns meshes and collectives and knows no router, activation or kernel: what experts
compute arrives as `grouped_fn`. Two transports give the same result on any mesh:

- gather: every expert shard sees all tokens of its data shard (all_gather), computes its own
  experts' share, and the shares are summed back (psum_scatter). The baseline, best for few shards.
- all_to_all: each shard sends every peer only the rows meant for it, in buffers of fixed size.
  Where a buffer is too small on any device, all devices replay the step through gather (the
  predicate is summed over them), so the result is exact and the overflow is counted. The replay
  takes a slice of the tokens at a time, which needs no more memory than the buffers do.

T tokens, D d_model, K experts per token, E experts, X experts of one shard, N expert shards. A row
is one choice of one token: R rows sorted by expert, Z rows of a buffer for one peer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from configs.checks import UserError
from parallel.mesh import BATCH_AXES, DATA, EXPERT, TENSOR, axis_sizes
from parallel.recompute import recomputed
from parallel.sharding import LogicalAxes

Transport = Literal["gather", "all_to_all"]

GroupedFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(x_RD sorted by expert, group_sizes_X, weights) -> y_RD; rows past the last group are ignored."""


class ExpertStats(NamedTuple):
    """What one call did."""

    load_E: jax.Array
    """Rows each expert received from all devices, int32 [E]."""
    overflow_rows: jax.Array
    """Rows that found no room, of all devices, int32; above 0 the call was replayed."""
    bytes_moved: jax.Array
    """Bytes each device sent to others in the forward pass, float32."""


class _Plan(NamedTuple):
    """What the bodies below need to know besides the arrays."""

    grouped_fn: GroupedFn
    num_experts: int
    data: int
    expert: int
    tensor: int
    capacity_factor: float | None
    kept: tuple[str, ...]


def apply_experts(
    x_TD: jax.Array,
    expert_ids_TK: jax.Array,
    gates_TK: jax.Array,
    weights: dict[str, Any],
    *,
    grouped_fn: GroupedFn,
    num_experts: int,
    weight_axes: dict[str, LogicalAxes],
    transport: Transport = "gather",
    capacity_factor: float | None = None,
    kept: tuple[str, ...] = (),
) -> tuple[jax.Array, ExpertStats]:
    """Returns sum over k of gates[t, k] * expert[expert_ids[t, k]](x[t]), [T, D] in x's dtype.

    The mesh is the one in use (`jax.set_mesh`); without one, everything happens in place. Tokens
    are split over the axes data and expert, and padded with idle ones where the count does not
    divide.

    Args:
      x_TD: float [T, D].
      expert_ids_TK: int32 [T, K] in [0, num_experts), or -1 for no work at all.
      gates_TK: float32 [T, K]; the sum over K is taken in float32.
      weights: arrays by name, or trees of arrays, whose first dimension is the expert.
      grouped_fn: what the experts compute; see GroupedFn. With a tensor axis it receives its slice
        of the weights and returns a partial sum.
      weight_axes: the logical axes of each, or those that all arrays of a tree begin with; "expert"
        and "mlp" decide how they are split.
      capacity_factor: all_to_all only: rows of a buffer over the rows of a balanced load.
      kept: names (jax.ad_checkpoint.checkpoint_name) of what the backward pass keeps of the work of
        grouped_fn; all else between tokens and results it computes again, the sorted rows too.
    Raises:
      UserError: the expert axis does not divide num_experts.
    """
    sizes = axis_sizes()
    if num_experts % sizes[EXPERT]:
        raise UserError(
            f"num_experts={num_experts} must be divisible by the 'expert' mesh axis "
            f"(size {sizes[EXPERT]}): change the mesh or num_experts"
        )
    plan = _Plan(grouped_fn, num_experts, **sizes, capacity_factor=capacity_factor, kept=kept)
    carry = TRANSPORTS[transport] if plan.expert > 1 else _gather

    def body(x_TD, expert_ids_TK, gates_TK, weights):
        out_TD, stats = carry(x_TD, expert_ids_TK, gates_TK, weights, plan)
        return out_TD.astype(x_TD.dtype), stats

    if plan.data * plan.expert * plan.tensor == 1:
        return body(x_TD, expert_ids_TK, gates_TK, weights)
    num_tokens = x_TD.shape[0]
    padding = -num_tokens % (plan.data * plan.expert)
    tokens = PartitionSpec(BATCH_AXES)
    out_TD, stats = jax.shard_map(
        body,
        in_specs=(tokens, tokens, tokens, _weight_specs(weights, weight_axes)),
        out_specs=(tokens, PartitionSpec()),
        # The replay's branches differ in what varies over devices; parity tests check gradients.
        check_vma=False,
    )(
        _pad_rows(x_TD, padding, 0),
        _pad_rows(expert_ids_TK, padding, -1),
        _pad_rows(gates_TK, padding, 0),
        weights,
    )
    return out_TD[:num_tokens], stats


def rows_per_peer(num_tokens: int, top_k: int, capacity_factor: float, shards: int) -> int:
    """all_to_all: rows of a device's buffer for one peer, Z, when it holds num_tokens."""
    room = -(-num_tokens * top_k * capacity_factor // shards)
    return min(num_tokens * top_k, int(room))


def _pad_rows(x: jax.Array, rows: int, value: int) -> jax.Array:
    return jnp.pad(x, ((0, rows), (0, 0)), constant_values=value) if rows else x


def _weight_specs(weights: dict[str, Any], weight_axes: dict[str, LogicalAxes]) -> dict[str, Any]:
    """Weights are split by expert and by feed-forward width; other dimensions arrive whole."""
    mesh_axes = {"expert": EXPERT, "mlp": TENSOR}
    return {
        name: PartitionSpec(*(mesh_axes.get(axis or "") for axis in weight_axes[name]))
        for name in weights
    }


# --- transports: one device's part, returning float32 out_TD ------------------------------------


def _gather(
    x_TD: jax.Array, expert_ids_TK: jax.Array, gates_TK: jax.Array, weights: Any, plan: _Plan
) -> tuple[jax.Array, ExpertStats]:
    """All tokens of the data shard come here; what this shard's experts add goes back summed."""
    bytes_moved = 0.0
    if plan.expert > 1:
        bytes_moved = (plan.expert - 1) * (_bytes(x_TD, expert_ids_TK, gates_TK) + 4 * x_TD.size)
        x_TD, expert_ids_TK, gates_TK = (
            lax.all_gather(a, EXPERT, tiled=True) for a in (x_TD, expert_ids_TK, gates_TK)
        )
    local_ids_TK = _local_ids(expert_ids_TK, plan)
    y_TKD, load_X = _run_experts(x_TD, local_ids_TK, weights, plan)
    out_TD = _combine(y_TKD, gates_TK)
    if plan.expert > 1:
        out_TD = lax.psum_scatter(out_TD, EXPERT, tiled=True)
    if plan.tensor > 1:
        out_TD = lax.psum(out_TD, TENSOR)
    load_E = _sum_over_data(load_X, plan)
    if plan.expert > 1:
        load_E = lax.all_gather(load_E, EXPERT, tiled=True)
    return out_TD, ExpertStats(load_E, jnp.int32(0), jnp.float32(bytes_moved))


def _all_to_all(
    x_TD: jax.Array, expert_ids_TK: jax.Array, gates_TK: jax.Array, weights: Any, plan: _Plan
) -> tuple[jax.Array, ExpertStats]:
    """Only the rows meant for a peer go there; any overflow anywhere replays through `_gather`."""
    num_tokens, top_k = expert_ids_TK.shape
    assert plan.capacity_factor is not None
    buffer_rows = rows_per_peer(num_tokens, top_k, plan.capacity_factor, plan.expert)
    experts_per_shard = plan.num_experts // plan.expert

    order_R, rank_TK = _sort_by_expert(expert_ids_TK, plan.num_experts)
    peers_TK = jnp.where(expert_ids_TK < 0, plan.expert, expert_ids_TK // experts_per_shard)
    rows_per_peer_N = jnp.bincount(peers_TK.reshape(-1), length=plan.expert + 1)[:-1]
    starts_N = jnp.cumsum(rows_per_peer_N) - rows_per_peer_N
    overflow = jnp.maximum(rows_per_peer_N - buffer_rows, 0).sum()
    overflow = _sum_over_data(lax.psum(overflow, EXPERT), plan)

    def fits():
        place_TK = rank_TK - jnp.append(starts_N, 0)[peers_TK]
        slot_TK = jnp.where(peers_TK < plan.expert, peers_TK * buffer_rows + place_TK, -1)
        place_NZ = jnp.broadcast_to(jnp.arange(buffer_rows)[None], (plan.expert, buffer_rows))
        row_NZ = jnp.minimum(starts_N[:, None] + place_NZ, order_R.shape[0] - 1)
        is_used_NZ = place_NZ < rows_per_peer_N[:, None]
        choice_R = jnp.where(is_used_NZ, order_R[row_NZ], -1).reshape(-1)

        def exchange(a):
            return lax.all_to_all(a, EXPERT, split_axis=0, concat_axis=0, tiled=True)

        local_ids_TK = jnp.where(expert_ids_TK < 0, -1, expert_ids_TK % experts_per_shard)
        sent_ids_R = jnp.where(choice_R < 0, -1, local_ids_TK.reshape(-1)[choice_R])
        got_RD = exchange(_to_rows(x_TD, choice_R, slot_TK))
        got_ids_R = exchange(sent_ids_R)
        y_R1D, load_X = _run_experts(got_RD, got_ids_R[:, None], weights, plan)
        y_TKD = _from_rows(exchange(y_R1D[:, 0]), choice_R, slot_TK)
        out_TD = _combine(y_TKD, gates_TK)
        if plan.tensor > 1:
            out_TD = lax.psum(out_TD, TENSOR)
        sent = (plan.expert - 1) * buffer_rows * (2 * x_TD.shape[1] * x_TD.dtype.itemsize + 4)
        load_E = lax.all_gather(_sum_over_data(load_X, plan), EXPERT, tiled=True)
        return out_TD, ExpertStats(load_E, overflow, jnp.float32(sent))

    @_recomputed  # else `fits` would write zeros in place of all that this would keep
    def overflows():
        out_TD, stats = _gather_in_slices(x_TD, expert_ids_TK, gates_TK, weights, plan)
        return out_TD, stats._replace(overflow_rows=overflow)

    return lax.cond(overflow > 0, overflows, fits)


TRANSPORTS = {"gather": _gather, "all_to_all": _all_to_all}
"""By name (Transport): where there is one expert shard, all carry nothing."""

_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Of such a function the backward pass keeps what goes in, and computes the rest again."""


def _gather_in_slices(
    x_TD: jax.Array, expert_ids_TK: jax.Array, gates_TK: jax.Array, weights: Any, plan: _Plan
) -> tuple[jax.Array, ExpertStats]:
    """`_gather`, a slice of the tokens after the other: no more come here at once than live here,
    where `expert` divides them. The slices' gradients of the weights are summed in float32.
    """
    num_slices = math.gcd(x_TD.shape[0], plan.expert)
    masters = jax.tree.map(lambda w: w.astype(jnp.float32), weights)

    @_recomputed
    def one_slice(masters, x_TD, expert_ids_TK, gates_TK):
        narrow = jax.tree.map(lambda w, like: w.astype(like.dtype), masters, weights)
        return _gather(x_TD, expert_ids_TK, gates_TK, narrow, plan)

    def sliced(a: jax.Array) -> jax.Array:
        return a.reshape(num_slices, -1, a.shape[1])

    tokens = (sliced(x_TD), sliced(expert_ids_TK), sliced(gates_TK))
    _, (out_STD, stats_S) = lax.scan(lambda _, t: (None, one_slice(masters, *t)), None, tokens)
    return out_STD.reshape(x_TD.shape), jax.tree.map(lambda a: a.sum(axis=0), stats_S)


def _local_ids(expert_ids_TK: jax.Array, plan: _Plan) -> jax.Array:
    """Ids counted from this shard's first expert, -1 for experts that live elsewhere."""
    if plan.expert == 1:
        return expert_ids_TK
    experts_per_shard = plan.num_experts // plan.expert
    local_TK = expert_ids_TK - lax.axis_index(EXPERT) * experts_per_shard
    return jnp.where((local_TK >= 0) & (local_TK < experts_per_shard), local_TK, -1)


def _sum_over_data(counts: jax.Array, plan: _Plan) -> jax.Array:
    return lax.psum(counts, DATA) if plan.data > 1 else counts


def _bytes(*arrays: jax.Array) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


# --- local work: sort, compute, put back --------------------------------------------------------


def _run_experts(
    x_TD: jax.Array, local_ids_TK: jax.Array, weights: Any, plan: _Plan
) -> tuple[jax.Array, jax.Array]:
    """Each choice's result, [T, K, D], zero where the id is -1; and the rows per expert, [X]."""
    num_local = plan.num_experts // plan.expert
    order_R, rank_TK = _sort_by_expert(local_ids_TK, num_local)
    keys_R = jnp.where(local_ids_TK < 0, num_local, local_ids_TK).reshape(-1)
    group_sizes_X = jnp.bincount(keys_R, length=num_local + 1)[:-1].astype(jnp.int32)
    is_used_R = jnp.arange(order_R.shape[0]) < group_sizes_X.sum()
    choice_R = jnp.where(is_used_R, order_R, -1)
    slot_TK = jnp.where(local_ids_TK < 0, -1, rank_TK)

    def work(tokens: tuple[jax.Array, ...], weights: Any) -> jax.Array:
        x_TD, choice_R, slot_TK, group_sizes_X = tokens
        return plan.grouped_fn(_to_rows(x_TD, choice_R, slot_TK), group_sizes_X, weights)

    tokens = (x_TD, choice_R, slot_TK, group_sizes_X)
    y_RD = recomputed(work, plan.kept)(tokens, weights)
    return _from_rows(y_RD, choice_R, slot_TK), group_sizes_X


def _sort_by_expert(ids_TK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """order_R: the choice t * K + k in each sorted place; rank_TK: each choice's place. -1 sorts
    last.
    """
    keys_R = jnp.where(ids_TK < 0, num_experts, ids_TK).reshape(-1)
    order_R = jnp.argsort(keys_R, stable=True).astype(jnp.int32)
    places_R = jnp.arange(order_R.shape[0], dtype=jnp.int32)
    rank_R = jnp.zeros_like(order_R).at[order_R].set(places_R, unique_indices=True)
    return order_R, rank_R.reshape(ids_TK.shape)


@jax.custom_vjp
def _to_rows(x_TD: jax.Array, choice_R: jax.Array, slot_TK: jax.Array) -> jax.Array:
    """Row r is the token of choice_R[r] = t * K + k; unused rows (-1) hold some token, ignored.

    `slot_TK`, each choice's row or -1, is the inverse map: with it the backward pass gathers
    instead of scattering.
    """
    return x_TD[jnp.maximum(choice_R, 0) // slot_TK.shape[1]]


def _to_rows_forward(x_TD, choice_R, slot_TK):
    return _to_rows(x_TD, choice_R, slot_TK), slot_TK


def _to_rows_backward(slot_TK, dy_RD):
    return _gather_choices(dy_RD, slot_TK).sum(axis=1), None, None


_to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def _from_rows(y_RD: jax.Array, choice_R: jax.Array, slot_TK: jax.Array) -> jax.Array:
    """The inverse of `_to_rows`: each choice's row, [T, K, D], zero where the slot is -1."""
    return _gather_choices(y_RD, slot_TK)


def _from_rows_forward(y_RD, choice_R, slot_TK):
    return _from_rows(y_RD, choice_R, slot_TK), choice_R


def _from_rows_backward(choice_R, dy_TKD):
    dy_RD = dy_TKD.reshape(-1, dy_TKD.shape[2])[jnp.maximum(choice_R, 0)]
    return jnp.where(choice_R[:, None] < 0, 0, dy_RD), None, None


_from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _gather_choices(y_RD: jax.Array, slot_TK: jax.Array) -> jax.Array:
    return jnp.where(slot_TK[:, :, None] < 0, 0, y_RD[jnp.maximum(slot_TK, 0)])


def _combine(y_TKD: jax.Array, gates_TK: jax.Array) -> jax.Array:
    """The gated sum over each token's choices, float32 [T, D]."""
    return (y_TKD.astype(jnp.float32) * gates_TK[:, :, None].astype(jnp.float32)).sum(axis=1)
