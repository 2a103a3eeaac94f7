"""Both sparse attentions for new tokens over a cache whose slot number is the position.

The new tokens are in the cache already. Their positions rise by one in each row, with padding (-1)
before or after them; a block of them looks at one contiguous range of slots, and beyond it at
log n slots per token or log n summaries per block: no [L, S] mask is made.

B batch, L new tokens, M new tokens of a block, S slots (or slots a block looks at), X slots or
summaries shared beyond those, P powers of two, U nodes, G key/value heads, R query heads per
key/value head, C head_dim, W width of values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.sparse_attention import tree
from kernels.sparse_attention.reference import blocks_before, powers_of_two
from kernels.sparse_attention.xla import MIN_BLOCK, attend
from kernels.window_attention import visible
from kernels.window_attention.reference import MASKED


def cached_power_attention(
    q_BLHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGW: jax.Array,
    positions_BL: jax.Array,
    slot_positions_BS: jax.Array,
    *,
    window_size: int,
    num_sink_tokens: int,
) -> jax.Array:
    """`power_attention` of the new tokens over the cache, [B, L, H, W].

    Args:
      positions_BL: int32, of the new tokens.
      slot_positions_BS: int32, the slot's number, or -1 where it is empty.
    """
    slots = k_BSGC.shape[1]
    window_size, num_sink_tokens = min(window_size, slots), min(num_sink_tokens, slots)
    powers = np.array(powers_of_two(window_size, slots), np.int32)

    def block(q_BGRMC: jax.Array, positions_BM: jax.Array) -> jax.Array:
        first_B1 = _first(positions_BM) - (window_size - 1)
        count = positions_BM.shape[1] + window_size - 1
        slots_BS = first_B1 + jnp.arange(count)[None]
        k_BGSC, v_BGSW = _at(k_BSGC, slots_BS), _at(v_BSGW, slots_BS)
        k_position_BS = _positions_at(slot_positions_BS, slots_BS)
        reach = {"window_size": window_size, "num_sink_tokens": num_sink_tokens}
        is_seen_BMS = visible(positions_BM[:, :, None], k_position_BS[:, None], **reach)
        if num_sink_tokens:
            sink_BX = slot_positions_BS[:, :num_sink_tokens]
            sink_BX = jnp.where(sink_BX < first_B1, sink_BX, -1)
            is_sink_BMX = visible(positions_BM[:, :, None], sink_BX[:, None], **reach)
            is_seen_BMS = jnp.concatenate([is_seen_BMS, is_sink_BMX], axis=-1)
            k_sink, v_sink = (
                x[:, :num_sink_tokens].transpose(0, 2, 1, 3) for x in (k_BSGC, v_BSGW)
            )
            k_BGSC = jnp.concatenate([k_BGSC, k_sink], axis=2)
            v_BGSW = jnp.concatenate([v_BGSW, v_sink], axis=2)
        bias_BMS = jnp.where(is_seen_BMS, 0.0, MASKED)
        if not len(powers):
            return attend(q_BGRMC, k_BGSC, v_BGSW, bias_BMS, None)[0]
        slots_BMP = positions_BM[:, :, None] - powers[None, None]
        slots_BMP = jnp.where(slots_BMP >= num_sink_tokens, slots_BMP, -1)
        batch, tokens, far = slots_BMP.shape
        flat_BS = slots_BMP.reshape(batch, tokens * far)
        is_far_BMP = _positions_at(slot_positions_BS, flat_BS).reshape(slots_BMP.shape) >= 0
        k_BGMPC = _at(k_BSGC, flat_BS).reshape(batch, -1, tokens, far, k_BSGC.shape[-1])
        v_BGMPW = _at(v_BSGW, flat_BS).reshape(batch, -1, tokens, far, v_BSGW.shape[-1])
        far_BGRMP = jnp.einsum(
            "BGRMC,BGMPC->BGRMP", q_BGRMC, k_BGMPC, preferred_element_type=jnp.float32
        )
        far_BGRMP = jnp.where(is_far_BMP[:, None, None], far_BGRMP, MASKED)
        out_BGRMW, weights_BGRMP = attend(q_BGRMC, k_BGSC, v_BGSW, bias_BMS, far_BGRMP)
        return out_BGRMW + jnp.einsum("BGRMP,BGMPW->BGRMW", weights_BGRMP, v_BGMPW)

    return _by_blocks(block, q_BLHC, positions_BL, k_BSGC.shape[2], MIN_BLOCK)


def cached_summary_attention(
    q_BLHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGW: jax.Array,
    nodes: tree.Nodes,
    positions_BL: jax.Array,
    slot_positions_BS: jax.Array,
    *,
    window_size: int,
    block_size: int,
) -> jax.Array:
    """`summary_attention` of the new tokens over the cache and its nodes [B, U], [B, L, H, W].

    Buckets are aligned to position 0. A block of new tokens may begin inside an aligned block: it
    then looks at the near slots and the summaries of both that it touches.
    """
    num_blocks = -(-k_BSGC.shape[1] // block_size)
    near = min(blocks_before(window_size, block_size), num_blocks - 1)
    num_levels = (num_blocks - 1 - near).bit_length()

    def block(q_BGRMC: jax.Array, positions_BM: jax.Array) -> jax.Array:
        own_BM = positions_BM // block_size
        touched_B1 = _first(positions_BM) // block_size
        spans = 1 if positions_BM.shape[1] == 1 else 2
        count = (near + spans) * block_size
        slots_BS = (touched_B1 - near) * block_size + jnp.arange(count)[None]
        k_BGSC, v_BGSW = _at(k_BSGC, slots_BS), _at(v_BSGW, slots_BS)
        k_position_BS = _positions_at(slot_positions_BS, slots_BS)
        is_seen_BMS = visible(
            positions_BM[:, :, None], k_position_BS[:, None], window_size=None, num_sink_tokens=0
        )
        is_seen_BMS &= own_BM[:, :, None] - k_position_BS[:, None] // block_size <= near
        bias_BMS = jnp.where(is_seen_BMS, 0.0, MASKED)
        parts = [(k_BGSC, v_BGSW, bias_BMS)]
        for i in range(spans if num_levels else 0):
            parts.append(_summaries(nodes, touched_B1 + i, own_BM, near, num_levels))
        bias_BMS = jnp.concatenate([bias for _, _, bias in parts], axis=-1)
        k_BGSC = jnp.concatenate([k.astype(k_BSGC.dtype) for k, _, _ in parts], axis=2)
        v_BGSW = jnp.concatenate([v.astype(v_BSGW.dtype) for _, v, _ in parts], axis=2)
        return attend(q_BGRMC, k_BGSC, v_BGSW, bias_BMS, None)[0]

    def _summaries(nodes, touched_B1, own_BM, near, num_levels):
        """Keys, values and bias of the buckets before the block `touched`."""
        sizes = tree.level_sizes(k_BSGC.shape[1] // block_size)
        begins = np.cumsum([0, *sizes])[:num_levels]
        has, index = tree.fenwick(touched_B1 - near, num_levels)
        has_BX = jnp.concatenate(has, axis=1)
        node_BX = jnp.concatenate([b + i for b, i in zip(begins, index, strict=True)], axis=1)
        node_BX = jnp.where(has_BX, node_BX, 0)
        is_seen_BMX = (own_BM == touched_B1)[:, :, None] & has_BX[:, None]
        log_rows_X = jnp.asarray(np.log(block_size << np.arange(num_levels)), jnp.float32)
        bias_BMX = jnp.where(is_seen_BMX, log_rows_X[None, None], MASKED)
        return _at(nodes.k_GC, node_BX), _at(nodes.v_GW, node_BX), bias_BMX

    return _by_blocks(block, q_BLHC, positions_BL, k_BSGC.shape[2], block_size)


def _by_blocks(
    attend_block: Callable[[jax.Array, jax.Array], jax.Array],
    q_BLHC: jax.Array,
    positions_BL: jax.Array,
    kv_heads: int,
    block: int,
) -> jax.Array:
    """The results of attend_block(q_BGRMC, positions_BM) for all new tokens, one block after the
    other, [B, L, H, W].
    """
    batch, length, heads, width = q_BLHC.shape
    block = min(block, length)
    extra = -length % block
    q_BLHC = jnp.pad(q_BLHC * width**-0.5, ((0, 0), (0, extra), (0, 0), (0, 0)))
    positions_BL = jnp.pad(positions_BL, ((0, 0), (0, extra)), constant_values=-1)
    q = q_BLHC.reshape(batch, -1, block, kv_heads, heads // kv_heads, width)
    q_NBGRMC = q.transpose(1, 0, 3, 4, 2, 5)
    positions_NBM = positions_BL.reshape(batch, -1, block).transpose(1, 0, 2)
    if len(q_NBGRMC) == 1:
        out_NBGRMW = attend_block(q_NBGRMC[0], positions_NBM[0])[None]
    else:
        out_NBGRMW = jax.lax.map(lambda x: attend_block(*x), (q_NBGRMC, positions_NBM))
    out_BNMGRW = out_NBGRMW.transpose(1, 0, 4, 2, 3, 5)
    return out_BNMGRW.reshape(batch, length + extra, heads, -1)[:, :length]


def _first(positions_BM: jax.Array) -> jax.Array:
    """Position of a block's first row, counted back from its first token over padding, [B, 1]; far
    below zero where all is padding.
    """
    tokens = positions_BM.shape[1]
    from_first_BM = positions_BM - jnp.arange(tokens)[None]
    return jnp.where(positions_BM >= 0, from_first_BM, -tokens).max(axis=1, keepdims=True)


def _at(x_BSGC: jax.Array, slots_BX: jax.Array) -> jax.Array:
    """Those slots, [B, G, X, C]; slots outside give any of the cache's."""
    slots_BX = jnp.clip(slots_BX, 0, x_BSGC.shape[1] - 1)
    found_BXGC = x_BSGC[jnp.arange(len(x_BSGC))[:, None], slots_BX]
    return found_BXGC.transpose(0, 2, 1, 3)


def _positions_at(slot_positions_BS: jax.Array, slots_BX: jax.Array) -> jax.Array:
    """Positions of those slots, -1 for empty ones and outside, [B, X]."""
    slots = slot_positions_BS.shape[1]
    inside_BX = jnp.clip(slots_BX, 0, slots - 1)
    found_BX = slot_positions_BS[jnp.arange(len(inside_BX))[:, None], inside_BX]
    return jnp.where((slots_BX >= 0) & (slots_BX < slots), found_BX, -1)
