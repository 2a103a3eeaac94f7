"""paged_attention as a Triton kernel: a program has some pages of one sequence, for one k/v head.

The query heads of a group are the rows of each product, padded to what tensor cores take. int8
pages become floats in registers, without their scales: a key's scale multiplies its scores, a
value's its weights, so that no page is written out wider than it lies in memory.

B sequences, H query heads, G key/value heads, R query heads of a group, C head_dim, W width of
values, P pages of S positions, N pages of a sequence, D programs of a sequence and group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import backend
from kernels.backend import Target, divide, dot, edge, load
from kernels.paged_attention.parts import (
    LOG2_E,
    Sums,
    Walk,
    added,
    num_parts,
    read,
    softmax_over,
    sums_shapes,
    unsupported_reason,
    wide,
    widened,
    write_sums,
)

PROGRAMS = 256
"""About two for each core of an A100 or H100."""
NUM_WARPS, NUM_STAGES = 4, 2


def paged_attention(
    q_BHC: jax.Array,
    k_pages_PSGC: jax.Array,
    v_pages_PSGW: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    k_scales_PSG: jax.Array | None = None,
    v_scales_PSG: jax.Array | None = None,
    window_size: int | None,
    num_sink_tokens: int,
    sink_logits_H: jax.Array | None = None,
    target: Target,
) -> jax.Array:
    """Returns the attention of each sequence's last position over its pages, [B, H, W].

    Raises:
      NotImplementedError: pages of a size that the kernel lacks.
    """
    reason = unsupported_reason(k_pages_PSGC.shape[1], q_BHC.shape[-1], v_pages_PSGW.shape[-1])
    if reason is not None:
        raise NotImplementedError(reason)
    (batch, heads, _), (_, size, kv_heads, width) = q_BHC.shape, v_pages_PSGW.shape
    parts = num_parts(PROGRAMS, batch * kv_heads, tables_BN.shape[1])
    walk = Walk(size, size, window_size, num_sink_tokens, parts)
    run = backend.triton_call(
        functools.partial(_kernel, walk=walk),
        name="paged_attention" if k_scales_PSG is None else "paged_attention_int8",
        num_programs=batch * kv_heads * parts,
        out_shape=sums_shapes(batch, parts, heads, width),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        target=target,
    )
    pages = (k_pages_PSGC, v_pages_PSGW, k_scales_PSG, v_scales_PSG)
    sums = run(q_BHC, *pages, tables_BN, lengths_B)
    return added(sums, sink_logits_H).astype(q_BHC.dtype)


def _kernel(q_BHC, k_PSGC, v_PSGW, k_scales_PSG, v_scales_PSG, tables_BN, lengths_B, *out, walk):
    kv_heads = v_PSGW.shape[2]
    in_group = q_BHC.shape[1] // kv_heads
    rest, part = divide(pl.program_id(0), walk.parts)
    batch, kv_head = divide(rest, kv_heads)
    rows = wide(in_group)
    heads, is_head_R = pl.ds(kv_head * in_group, rows), edge(0, rows, in_group)
    q_RC = read(q_BHC, (batch, heads), rows, is_head_R)

    def look(page, positions, is_seen_S):
        at = (page, positions, kv_head)
        k_SC = widened(read(k_PSGC, at, walk.block_size), q_RC.dtype)
        scores_RS = dot(q_RC, k_SC.T) * (LOG2_E / math.sqrt(q_BHC.shape[2]))
        if k_scales_PSG is not None:
            scores_RS *= load(k_scales_PSG.at[at]).astype(jnp.float32)[None]

        def summed(weights_RS):
            v_SW = widened(read(v_PSGW, at, walk.block_size, is_seen_S), q_RC.dtype)
            if v_scales_PSG is not None:
                v_scales_S = load(v_scales_PSG.at[at], is_seen_S).astype(jnp.float32)
                weights_RS = weights_RS * v_scales_S[None]
            return dot(weights_RS.astype(v_SW.dtype), v_SW)

        return scores_RS, summed

    shape = (rows, wide(v_PSGW.shape[3]))
    sums = softmax_over(walk, tables_BN, lengths_B, batch, part, shape=shape, look=look)
    write_sums(Sums(*out), sums, batch, part, heads, is_head_R)
