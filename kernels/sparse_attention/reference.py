"""The definition of both sparse attentions: one dense mask, one softmax.

B batch, L rows (queries), S keys, U buckets, G key/value heads, R query heads per key/value head, H
= G * R, C head_dim, W width of values.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.window_attention import masked_attention, visible
from kernels.window_attention.reference import MASKED


def powers_of_two(least: int, below: int) -> list[int]:
    """The powers of two d with least <= d < below."""
    return [1 << p for p in range(max(below - 1, 0).bit_length()) if 1 << p >= least]


def num_edges(length: int, window_size: int, num_sink_tokens: int) -> int:
    """Pairs of query and key in one document: for the query at position i the window, the powers of
    two up to i and the sinks, each key counted once; at most w + floor(log2 i) + 1 + g.
    """
    edges = 0
    for i in range(length):
        first_near = max(i - window_size + 1, 0)
        sinks = min(num_sink_tokens, first_near)
        far = [d for d in powers_of_two(window_size, i + 1) if i - d >= num_sink_tokens]
        edges += i + 1 - first_near + sinks + len(far)
    return edges


def seen_by_power_attention(
    q_positions: jax.Array, k_positions: jax.Array, *, window_size: int, num_sink_tokens: int
) -> jax.Array:
    """Whether a query at i sees a key at j: i - j < w, i - j = 2^p, or j < num_sink_tokens."""
    distance = q_positions - k_positions
    near = visible(
        q_positions, k_positions, window_size=window_size, num_sink_tokens=num_sink_tokens
    )
    is_power = (distance > 0) & ((distance & (distance - 1)) == 0)
    return near | (is_power & (k_positions >= 0))


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
    """Returns softmax(q k^T / sqrt(C)) v over the visible keys of the segment, [B, L, H, W]."""
    mask_BLS = seen_by_power_attention(
        positions_BL[:, :, None],
        positions_BL[:, None, :],
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
    )
    mask_BLS &= segments_BL[:, :, None] == segments_BL[:, None, :]
    return masked_attention(q_BLHC, k_BLGC, v_BLGW, mask_BLS)


def blocks_before(window_size: int, block_size: int) -> int:
    """Blocks before a row's own that its window needs."""
    return -(-(window_size - 1) // block_size)


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
    """Returns attention over the window's blocks and one key per bucket, [B, L, H, W]."""
    length = k_BLGC.shape[1]
    buckets = _buckets(length, block_size)
    near = blocks_before(window_size, block_size)
    k_BUGC, v_BUGW = _pool(k_BLGC, v_BLGW, pool_GC, buckets)
    keys_BSGC = jnp.concatenate([k_BLGC, k_BUGC], axis=1)
    values_BSGW = jnp.concatenate([v_BLGW, v_BUGW], axis=1)
    first_row_S = np.array([*range(length), *(begin for begin, _ in buckets)])
    rows_S = np.array([1] * length + [end - begin for begin, end in buckets])
    seen_LS = np.array(
        [
            [i // block_size - near <= j // block_size and j <= i for j in range(length)]
            + [_is_in_fenwick(i // block_size - near, a, b, block_size) for a, b in buckets]
            for i in range(length)
        ]
    )
    mask_BLS = jnp.asarray(seen_LS)[None]
    mask_BLS &= segments_BL[:, :, None] == segments_BL[:, None, first_row_S]
    mask_BLS &= (positions_BL[:, :, None] >= 0) & (positions_BL[:, None, first_row_S] >= 0)
    log_rows_S = jnp.asarray(np.log(rows_S), jnp.float32)
    return _biased_attention(q_BLHC, keys_BSGC, values_BSGW, mask_BLS, log_rows_S)


def _biased_attention(q_BLHC, k_BSGC, v_BSGW, mask_BLS, bias_S) -> jax.Array:
    batch, length, heads, width = q_BLHC.shape
    kv_heads = k_BSGC.shape[2]
    q_BLGRC = (q_BLHC * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BGRLS = jnp.einsum(
        "BLGRC,BSGC->BGRLS", q_BLGRC, k_BSGC, preferred_element_type=jnp.float32
    )
    scores_BGRLS += bias_S[None, None, None, None]
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, MASKED)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1).astype(v_BSGW.dtype)
    out_BLGRW = jnp.einsum("BGRLS,BSGW->BLGRW", weights_BGRLS, v_BSGW)
    return out_BLGRW.reshape(batch, length, heads, v_BSGW.shape[-1])


def _buckets(length: int, block_size: int) -> list[tuple[int, int]]:
    """(first row, end) of all aligned buckets of 1, 2, 4, ... blocks that the rows fill."""
    size, found = block_size, []
    while size <= length:
        found += [(begin, begin + size) for begin in range(0, length - size + 1, size)]
        size *= 2
    return found


def _is_in_fenwick(num_blocks: int, begin: int, end: int, block_size: int) -> bool:
    """Whether the first num_blocks blocks, cut greedily from the front into powers of two, have
    this bucket.
    """
    done = 0
    while done < num_blocks:
        size = 1 << ((num_blocks - done).bit_length() - 1)
        if (begin, end) == (done * block_size, (done + size) * block_size):
            return True
        done += size
    return False


def _pool(
    k_BLGC: jax.Array, v_BLGW: jax.Array, pool_GC: jax.Array, buckets: list[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Each bucket's one key and value, [B, U, G, C] and [B, U, G, W]."""
    k32_BLGC, v32_BLGW = k_BLGC.astype(jnp.float32), v_BLGW.astype(jnp.float32)
    rows = np.arange(k_BLGC.shape[1])
    is_in_UL = np.array([(begin <= rows) & (rows < end) for begin, end in buckets])
    is_in_UL = is_in_UL.reshape(len(buckets), len(rows))  # also where there is none
    logits_BGL = jnp.einsum("BLGC,GC->BGL", k32_BLGC, pool_GC)
    logits_BGUL = jnp.where(is_in_UL[None, None], logits_BGL[:, :, None], MASKED)
    weights_BGUL = jax.nn.softmax(logits_BGUL, axis=-1)
    k_BUGC = jnp.einsum("BGUL,BLGC->BUGC", weights_BGUL, k32_BLGC)
    v_BUGW = jnp.einsum("BGUL,BLGW->BUGW", weights_BGUL, v32_BLGW)
    return k_BUGC.astype(k_BLGC.dtype), v_BUGW.astype(v_BLGW.dtype)
