"""Both sparse attentions by blocks of rows, so that the work is O(n (w + log n)).

Near: the rows of a block against those of its own block and of the blocks before it that the window
needs, as one matmul. What a block's rows share beyond those stands beside them as more keys: the
sinks (rows whose document begins before the block's keys are all of one document), or the
summaries. Powers of two differ from row to row: the keys are shifted by each, with static slices.
One softmax runs over all. Long sequences go through a loop over groups of blocks, whose scores
are made again in the backward pass.

N blocks, B batch, M rows of a block, S keys of a block, X of them shared beyond the near ones, P
powers of two, L rows, G key/value heads, R query heads per key/value head, C head_dim, W width of
values.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.sparse_attention import tree
from kernels.sparse_attention.reference import blocks_before, powers_of_two
from kernels.window_attention import visible
from kernels.window_attention.reference import MASKED

MIN_BLOCK = 64
ROWS_AT_ONCE = 2048
"""Longer sequences are looped over in groups of blocks of at most this many rows."""


def power_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int,
    num_sink_tokens: int,
) -> jax.Array:
    """Returns attention over the window, powers of two and sinks, [B, L, H, W]."""
    length, heads = q_BLHC.shape[1:3]
    window_size = min(window_size, length)
    # Wide windows get wider blocks: fewer copies of each key, and a quarter more work.
    block = min(length, max(MIN_BLOCK, -(-window_size // 4)))
    q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL = _padded(
        block, q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL
    )
    q_BLGRC = _grouped(q_BLHC, k_BLGC.shape[2])
    near = blocks_before(window_size, block)
    q_position_NBM, k_position_NBS, is_same_NBMS = _near_rows(
        positions_BL, segments_BL, block, near
    )
    is_near_NBMS = is_same_NBMS & visible(
        q_position_NBM[..., :, None],
        k_position_NBS[..., None, :],
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
    )
    k_NBGSC, v_NBGSW = (_with_before(_blocks(x, block), near) for x in (k_BLGC, v_BLGW))
    if num_sink_tokens and near < len(q_position_NBM) - 1:
        rows_BNX, is_sink_NBMX = _sinks(positions_BL, segments_BL, block, near, num_sink_tokens)
        k_NBGSC = jnp.concatenate([k_NBGSC, _rows_of_blocks(k_BLGC, rows_BNX)], axis=3)
        v_NBGSW = jnp.concatenate([v_NBGSW, _rows_of_blocks(v_BLGW, rows_BNX)], axis=3)
        is_near_NBMS = jnp.concatenate([is_near_NBMS, is_sink_NBMX], axis=-1)
    bias_NBMS = jnp.where(is_near_NBMS, 0.0, MASKED)
    q_NBGRMC = _blocks(q_BLGRC, block)
    powers = powers_of_two(window_size, length)
    if not powers:
        out_NBGRMW, _ = _looped(q_NBGRMC, k_NBGSC, v_NBGSW, bias_NBMS, None)
        return _unblocked(out_NBGRMW, length, heads)
    far_BLGRP = _far_scores(q_BLGRC, k_BLGC, positions_BL, segments_BL, powers, num_sink_tokens)
    far_NBGRMP = _blocks(far_BLGRP, block)
    out_NBGRMW, weights_NBGRMP = _looped(q_NBGRMC, k_NBGSC, v_NBGSW, bias_NBMS, far_NBGRMP)
    assert weights_NBGRMP is not None
    weights_BLHP = _unblocked(weights_NBGRMP, length, heads)
    out_BLHW = _unblocked(out_NBGRMW, length, heads)
    return out_BLHW + _far_values(weights_BLHP, v_BLGW[:, :length], powers)


def summary_attention(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGW: jax.Array,
    pool_GC: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window_size: int,
    block_size: int,
) -> jax.Array:
    """Returns attention over the window's blocks and summaries before them, [B, L, H, W]."""
    length, heads = q_BLHC.shape[1:3]
    q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL = _padded(
        block_size, q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL
    )
    near = min(blocks_before(window_size, block_size), positions_BL.shape[1] // block_size - 1)
    q_position_NBM, k_position_NBS, is_same_NBMS = _near_rows(
        positions_BL, segments_BL, block_size, near
    )
    is_near_NBMS = is_same_NBMS & visible(
        q_position_NBM[..., :, None],
        k_position_NBS[..., None, :],
        window_size=None,
        num_sink_tokens=0,
    )
    bias_NBMS = jnp.where(is_near_NBMS, 0.0, MASKED)
    k_NBGMC, v_NBGMW = _blocks(k_BLGC, block_size), _blocks(v_BLGW, block_size)
    k_NBGSC, v_NBGSW = _with_before(k_NBGMC, near), _with_before(v_NBGMW, near)
    num_levels = (len(k_NBGMC) - 1 - near).bit_length()
    if num_levels:
        found = tree.levels(tree.pooled(k_NBGMC, v_NBGMW, pool_GC), num_levels)
        k_NBGXC, v_NBGXW = (
            _spread([getattr(x, n) for x in found], near, len(k_NBGMC)) for n in ("k_GC", "v_GW")
        )
        k_NBGSC = jnp.concatenate([k_NBGSC, k_NBGXC.astype(k_BLGC.dtype)], axis=3)
        v_NBGSW = jnp.concatenate([v_NBGSW, v_NBGXW.astype(v_BLGW.dtype)], axis=3)
        bias_NBMX = _bucket_bias(positions_BL, segments_BL, block_size, near, num_levels)
        bias_NBMS = jnp.concatenate([bias_NBMS, bias_NBMX], axis=-1)
    q_NBGRMC = _blocks(_grouped(q_BLHC, k_BLGC.shape[2]), block_size)
    out_NBGRMW, _ = _looped(q_NBGRMC, k_NBGSC, v_NBGSW, bias_NBMS, None)
    return _unblocked(out_NBGRMW, length, heads)


def attend(
    q_GRMC: jax.Array,
    k_GSC: jax.Array,
    v_GSW: jax.Array,
    bias_MS: jax.Array,
    far_GRMP: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """One softmax over a block's keys and each row's own far scores; any dims before those named.

    Args:
      bias_MS: float32, added to the scores: 0 or the log of a bucket's rows, MASKED where unseen.
      far_GRMP: float32 scores of keys that the rows of the block do not share.
    Returns:
      what the block's keys give, and the weights of the far ones, in v's dtype.
    """
    scores_GRMS = jnp.einsum(
        "...GRMC,...GSC->...GRMS", q_GRMC, k_GSC, preferred_element_type=jnp.float32
    )
    scores_GRMS += bias_MS[..., None, None, :, :]
    if far_GRMP is None:
        weights_GRMS = jax.nn.softmax(scores_GRMS, axis=-1).astype(v_GSW.dtype)
        return jnp.einsum("...GRMS,...GSW->...GRMW", weights_GRMS, v_GSW), None
    scores = jnp.concatenate([scores_GRMS, far_GRMP], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_GSW.dtype)
    weights_GRMS, weights_GRMP = jnp.split(weights, [k_GSC.shape[-2]], axis=-1)
    return jnp.einsum("...GRMS,...GSW->...GRMW", weights_GRMS, v_GSW), weights_GRMP


def _looped(q_NBGRMC, k_NBGSC, v_NBGSW, bias_NBMS, far_NBGRMP):
    """`attend` on all blocks at once, or on groups of ROWS_AT_ONCE rows one after the other."""
    blocks, block = q_NBGRMC.shape[0], q_NBGRMC.shape[-2]
    operands = (q_NBGRMC, k_NBGSC, v_NBGSW, bias_NBMS, far_NBGRMP)
    if blocks * block <= ROWS_AT_ONCE:
        return attend(*operands)
    group = max(ROWS_AT_ONCE // block, 1)
    return jax.lax.map(jax.checkpoint(lambda x: attend(*x)), operands, batch_size=group)


# --- Rows and blocks of rows ----------------------------------------------------------------------


def _padded(block, q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL):
    """The arguments with whole blocks of rows; the new ones are padding at position -1."""
    extra = -q_BLHC.shape[1] % block
    if not extra:
        return q_BLHC, k_BLGC, v_BLGW, positions_BL, segments_BL
    arrays = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q_BLHC, k_BLGC, v_BLGW))
    rows = (
        jnp.pad(x, ((0, 0), (0, extra)), constant_values=-1) for x in (positions_BL, segments_BL)
    )
    return *arrays, *rows


def _grouped(q_BLHC: jax.Array, kv_heads: int) -> jax.Array:
    """Scaled queries by key/value head, [B, L, G, R, C]."""
    batch, length, heads, width = q_BLHC.shape
    return (q_BLHC * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)


def _blocks(x_BLGC: jax.Array, block: int) -> jax.Array:
    """[B, L, ..., C] as [N, B, ..., M, C]: blocks first, rows beside the width."""
    x_BNMGC = x_BLGC.reshape(len(x_BLGC), -1, block, *x_BLGC.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x_BNMGC, 2, -2), 0, 1)


def _unblocked(x_NBGRMC: jax.Array, length: int, heads: int) -> jax.Array:
    """The first `length` rows, [B, L, H, C]."""
    x_BNMGRC = jnp.moveaxis(jnp.moveaxis(x_NBGRMC, 0, 1), -2, 2)
    batch, blocks, block = x_BNMGRC.shape[:3]
    x_BLHC = x_BNMGRC.reshape(batch, blocks * block, heads, x_BNMGRC.shape[-1])
    return x_BLHC[:, :length]


def _with_before(x_NBGMC: jax.Array, near: int, empty: int = 0) -> jax.Array:
    """Each block's rows after those of the `near` blocks before it; `empty` before the first."""
    padding = ((near, 0, 0), *((0, 0, 0) for _ in x_NBGMC.shape[1:]))
    x = jax.lax.pad(x_NBGMC, jnp.asarray(empty, x_NBGMC.dtype), padding)
    return jnp.concatenate([x[i : i + len(x_NBGMC)] for i in range(near + 1)], axis=-2)


def _near_rows(positions_BL, segments_BL, block, near):
    """Positions of each block's rows [N, B, M] and keys [N, B, S], and whether their documents are
    one [N, B, M, S].
    """

    def blocked(x_BL):
        return _blocks(x_BL[..., None], block)

    q_NBM1, k_NBS1 = blocked(positions_BL), _with_before(blocked(positions_BL), near, -1)
    q_segment_NBM1 = blocked(segments_BL)
    k_segment_NBS1 = _with_before(q_segment_NBM1, near)
    return q_NBM1[..., 0], k_NBS1[..., 0], q_segment_NBM1 == k_segment_NBS1[..., 0][..., None, :]


def _rows_of_blocks(x_BLGC: jax.Array, rows_BNX: jax.Array) -> jax.Array:
    """Those rows as keys of their blocks, [N, B, G, X, C]."""
    batch, blocks, shared = rows_BNX.shape
    row_B1 = jnp.arange(batch)[:, None]
    found = x_BLGC[row_B1, rows_BNX.reshape(batch, -1)]
    found_BNXGC = found.reshape(batch, blocks, shared, *x_BLGC.shape[2:])
    return found_BNXGC.transpose(1, 0, 3, 2, 4)


# --- What lies beyond the near blocks -------------------------------------------------------------


def _sinks(positions_BL, segments_BL, block, near, num_sink_tokens):
    """Rows of each block's sinks [B, N, X], and which of its rows see them, [N, B, M, X].

    Only documents that begin before the block's first key have sinks that are not among its keys,
    and only the document of that first key can reach the block: one set of sinks per block.
    """
    blocks = positions_BL.shape[1] // block
    first_N = (np.arange(blocks) - near) * block
    at_N = np.maximum(first_N, 0)
    rows_BNX = (
        at_N[None, :, None] - positions_BL[:, at_N, None] + np.arange(num_sink_tokens)[None, None]
    )
    exists_BNX = (rows_BNX >= 0) & (rows_BNX < first_N[None, :, None])
    exists_BNX &= (positions_BL[:, at_N] >= 0)[:, :, None]
    rows_BNX = jnp.clip(rows_BNX, 0, positions_BL.shape[1] - 1)
    batch = len(positions_BL)
    row_B1 = jnp.arange(batch)[:, None]
    segment_BNX = segments_BL[row_B1, rows_BNX.reshape(batch, -1)].reshape(rows_BNX.shape)
    own_NBM = _blocks(segments_BL[..., None], block)[..., 0]
    is_token_NBM = _blocks(positions_BL[..., None], block)[..., 0] >= 0
    is_same_NBMX = own_NBM[..., None] == segment_BNX.transpose(1, 0, 2)[:, :, None]
    exists_NBX = exists_BNX.transpose(1, 0, 2)
    return rows_BNX, is_same_NBMX & exists_NBX[:, :, None] & is_token_NBM[..., None]


def _far_scores(q_BLGRC, k_BLGC, positions_BL, segments_BL, powers, num_sink_tokens):
    """Scores of the keys at each power of two beyond the window, float32 [B, L, G, R, P].

    Sinks are left out: they stand beside the near keys.
    """
    scores, length = [], q_BLGRC.shape[1]
    for d in powers:
        is_seen_BL = positions_BL[:, d:] - d >= num_sink_tokens
        is_seen_BL &= segments_BL[:, d:] == segments_BL[:, : length - d]
        k_BLG1C = k_BLGC[:, : length - d, :, None].astype(jnp.float32)
        score_BLGR = (q_BLGRC[:, d:].astype(jnp.float32) * k_BLG1C).sum(axis=-1)
        score_BLGR = jnp.where(is_seen_BL[:, :, None, None], score_BLGR, MASKED)
        before = ((0, 0), (d, 0), (0, 0), (0, 0))
        scores.append(jnp.pad(score_BLGR, before, constant_values=MASKED))
    return jnp.stack(scores, axis=-1)


def _far_values(weights_BLHP: jax.Array, v_BLGW: jax.Array, powers: list[int]) -> jax.Array:
    """The weighted sum of the values at each power of two, [B, L, H, W]."""
    batch, length, heads, _ = weights_BLHP.shape
    kv_heads = v_BLGW.shape[2]
    weights_BLGRP = weights_BLHP.reshape(batch, length, kv_heads, heads // kv_heads, -1)
    total = jnp.zeros((batch, length, heads, v_BLGW.shape[-1]), v_BLGW.dtype)
    for i, d in enumerate(powers):
        v_BLG1W = v_BLGW[:, : length - d, :, None]
        part_BLGRW = weights_BLGRP[:, d:, ..., i, None] * v_BLG1W
        part_BLHW = part_BLGRW.reshape(batch, length - d, heads, -1)
        total += jnp.pad(part_BLHW, ((0, 0), (d, 0), (0, 0), (0, 0)))
    return total


def _spread(levels: list[jax.Array], near: int, blocks: int) -> jax.Array:
    """Each block's bucket of each level, [N, B, G, X, C]; zeros where it has none.

    Node i of level k belongs to the blocks with i = (c >> k) - 1, c blocks before the near ones:
    2^k in a row, of which half see it.
    """
    spread = []
    for level, x_NBGC in enumerate(levels):
        no_node = jnp.zeros((1, *x_NBGC.shape[1:]), x_NBGC.dtype)
        by_count = jnp.repeat(jnp.concatenate([no_node, x_NBGC]), 1 << level, axis=0)
        by_count = by_count[: blocks - near]
        first = ((near, 0), *((0, 0) for _ in x_NBGC.shape[1:]))
        spread.append(jnp.pad(by_count, first))
    return jnp.stack(spread, axis=-2)


def _bucket_bias(positions_BL, segments_BL, block, near, num_levels):
    """Log of the bucket's rows where a block's rows see it, else MASKED, [N, B, M, X]."""
    blocks = positions_BL.shape[1] // block
    has, index = tree.fenwick(np.arange(blocks) - near, num_levels)
    has_NX, level_X = np.stack(has, axis=-1), np.arange(num_levels)
    first_NX = np.where(has_NX, (np.stack(index, axis=-1) << level_X) * block, 0)
    segment_NBX = segments_BL[:, first_NX].transpose(1, 0, 2)
    is_token_NBX = positions_BL[:, first_NX].transpose(1, 0, 2) >= 0
    own_NBM = _blocks(segments_BL[..., None], block)[..., 0]
    is_row_NBM = _blocks(positions_BL[..., None], block)[..., 0] >= 0
    is_seen = own_NBM[..., None] == segment_NBX[:, :, None]
    is_seen &= (is_token_NBX & jnp.asarray(has_NX)[:, None])[:, :, None] & is_row_NBM[..., None]
    log_rows_X = jnp.asarray(np.log(block << level_X), jnp.float32)
    return jnp.where(is_seen, log_rows_X[None, None, None], MASKED)
