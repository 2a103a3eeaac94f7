"""The binary tree of summaries: each node is the pooled key and value of 2^k aligned blocks.

A node also keeps the log of its pooling weights' sum, so that two nodes make their parent without
looking at the rows again. Level k has the whole buckets of 2^k blocks, floor(N / 2^k) of them; for
a cache all levels lie behind one another in one array.

B batch, N blocks (or nodes of a level), M rows of a block, U nodes of all levels, P levels, S rows,
G key/value heads, C head_dim, W width of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Nodes(NamedTuple):
    """Summaries, float32: the dims before G are [N, B] in a level and [B, U] in a cache."""

    log_weight_G: jax.Array
    """Log of the sum of exp(pool . k) over the bucket's rows."""
    k_GC: jax.Array
    v_GW: jax.Array


def level_sizes(num_blocks: int) -> list[int]:
    """Nodes of each level over num_blocks whole blocks."""
    return [num_blocks >> level for level in range(num_blocks.bit_length())]


def pooled(k_NBGMC: jax.Array, v_NBGMW: jax.Array, pool_GC: jax.Array) -> Nodes:
    """Level 0: softmax(pool . k) over the rows of each block."""
    k32_NBGMC, v32_NBGMW = k_NBGMC.astype(jnp.float32), v_NBGMW.astype(jnp.float32)
    logits_NBGM = jnp.einsum("NBGMC,GC->NBGM", k32_NBGMC, pool_GC)
    log_weight_NBG = jax.nn.logsumexp(logits_NBGM, axis=-1)
    weights_NBGM = jnp.exp(logits_NBGM - log_weight_NBG[..., None])
    return Nodes(
        log_weight_NBG,
        jnp.einsum("NBGM,NBGMC->NBGC", weights_NBGM, k32_NBGMC),
        jnp.einsum("NBGM,NBGMW->NBGW", weights_NBGM, v32_NBGMW),
    )


def merged(left: Nodes, right: Nodes) -> Nodes:
    """The parents of neighbouring nodes."""
    left_share = jax.nn.sigmoid(left.log_weight_G - right.log_weight_G)[..., None]
    return Nodes(
        jnp.logaddexp(left.log_weight_G, right.log_weight_G),
        left_share * left.k_GC + (1 - left_share) * right.k_GC,
        left_share * left.v_GW + (1 - left_share) * right.v_GW,
    )


def levels(leaves: Nodes, num_levels: int) -> list[Nodes]:
    """The leaves and the levels above them, num_levels in all; nodes in dim 0."""
    found = [leaves]
    while len(found) < num_levels:
        pairs = jax.tree.map(lambda x: x[: len(x) // 2 * 2].reshape(-1, 2, *x.shape[1:]), found[-1])
        found.append(merged(*(jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in range(2))))
    return found[:num_levels]


# --- In a cache -----------------------------------------------------------------------------------


def empty_nodes(
    stack: tuple[int, ...], num_slots: int, block_size: int, kv_heads: int, key: int, value: int
) -> Nodes:
    """Room for all nodes over num_slots tokens; `stack` are the dims before them."""
    dims = (*stack, sum(level_sizes(num_slots // block_size)), kv_heads)
    return Nodes(
        jnp.zeros(dims, jnp.float32),
        jnp.zeros((*dims, key), jnp.float32),
        jnp.zeros((*dims, value), jnp.float32),
    )


def rebuilt(k_BSGC: jax.Array, v_BSGW: jax.Array, pool_GC: jax.Array, block_size: int) -> Nodes:
    """All nodes over the slots of a cache, [B, U]; those over empty slots mean nothing yet."""
    sizes = level_sizes(k_BSGC.shape[1] // block_size)

    def blocked(x_BSGC: jax.Array) -> jax.Array:
        x_BSGC = x_BSGC[:, : x_BSGC.shape[1] // block_size * block_size]
        x_BNMGC = x_BSGC.reshape(len(x_BSGC), -1, block_size, *x_BSGC.shape[2:])
        return x_BNMGC.transpose(1, 0, 3, 2, 4)

    found = levels(pooled(blocked(k_BSGC), blocked(v_BSGW), pool_GC), max(len(sizes), 1))
    return jax.tree.map(lambda *x: jnp.moveaxis(jnp.concatenate(x), 0, 1), *found)


def updated(
    nodes: Nodes,
    k_BSGC: jax.Array,
    v_BSGW: jax.Array,
    pool_GC: jax.Array,
    positions_B: jax.Array,
    block_size: int,
) -> Nodes:
    """The nodes after the token at positions_B was written: its block and all that hold the block.

    They are made again with each token, and seen only when they are whole. A position of -1 changes
    nothing.
    """
    sizes = level_sizes(k_BSGC.shape[1] // block_size)
    block_B, row_B1 = positions_B // block_size, jnp.arange(len(positions_B))[:, None]
    slots_BM = block_B[:, None] * block_size + jnp.arange(block_size)[None]
    k_BMGC = k_BSGC.at[row_B1, slots_BM].get(mode="clip")
    v_BMGW = v_BSGW.at[row_B1, slots_BM].get(mode="clip")
    heads_first = (0, 2, 1, 3)
    own = pooled(k_BMGC.transpose(heads_first)[None], v_BMGW.transpose(heads_first)[None], pool_GC)
    own = jax.tree.map(lambda x: x[0], own)
    begin, begin_below = 0, 0
    for level, size in enumerate(sizes):
        index_B = block_B >> level
        if level:
            children = [
                _at(nodes, begin_below + 2 * index_B + i, sizes[level - 1] + begin_below)
                for i in range(2)
            ]
            own = merged(*children)
        is_whole_B = (positions_B >= 0) & (index_B < size)
        place_B = jnp.where(is_whole_B, begin + index_B, sum(sizes))  # past the end: dropped
        nodes = jax.tree.map(
            lambda x, new, place_B=place_B: x.at[row_B1[:, 0], place_B].set(new, mode="drop"),
            nodes,
            own,
        )
        begin_below, begin = begin, begin + size
    return nodes


def _at(nodes: Nodes, index_B: jax.Array, end: int) -> Nodes:
    index_B = jnp.clip(index_B, 0, end - 1)
    return jax.tree.map(lambda x: x[jnp.arange(len(index_B)), index_B], nodes)


def fenwick(blocks: jax.Array | np.ndarray, num_levels: int) -> tuple[list, list]:
    """The buckets of the first `blocks` blocks: for each level whether it has one, and its index.

    A bit of the number is a bucket; higher bits lie before it, so at level k it is the node
    (blocks >> k) - 1.
    """
    shifted = [blocks >> level for level in range(num_levels)]
    return [(blocks > 0) & (s & 1 == 1) for s in shifted], [s - 1 for s in shifted]
