"""paged_latent_attention as a Triton kernel: a program has some positions for a block of heads.

All heads read the same latents, so a block of heads is the rows of one product, and a latent that
is loaded serves twice: as the key of a score and as the value that it weighs.

B sequences, H query heads, M heads of a program, R latent_rank, P rope_head_dim, Z pages of S
positions, N pages of a sequence, D parts of a sequence.
"""

import functools
from typing import NamedTuple

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
    widened,
    write_sums,
)

PROGRAMS = 128
"""About one for each core of an A100 or H100, whose shared memory holds no second."""


class Block(NamedTuple):
    """What a program works on at a time, and how it is compiled; none spills (compiled.json)."""

    heads: int
    positions: int
    num_warps: int
    num_stages: int


FEW_HEADS = Block(16, 32, 4, 2)
MANY_HEADS = Block(64, 32, 8, 2)
FEW_HEADS_INT8 = Block(16, 32, 8, 2)
MANY_HEADS_INT8 = Block(32, 32, 8, 2)
"""A latent that became floats waits in registers between its two products."""


def choose_block(heads: int, page_size: int, *, is_int8: bool) -> Block:
    """Returns the block for so many heads: the more at once, the less often a latent is read."""
    if is_int8:
        block = FEW_HEADS_INT8 if heads <= 16 else MANY_HEADS_INT8
    else:
        block = FEW_HEADS if heads <= 16 else MANY_HEADS
    return block._replace(positions=min(block.positions, page_size))


def paged_latent_attention(
    q_latent_BHR: jax.Array,
    q_rope_BHP: jax.Array,
    latent_pages_ZSR: jax.Array,
    rope_pages_ZSP: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    latent_scales_ZS: jax.Array | None = None,
    scale: float,
    window_size: int | None,
    num_sink_tokens: int,
    target: Target,
) -> jax.Array:
    """Returns the latents summed by each head's weights, [B, H, R].

    Raises:
      NotImplementedError: pages of a size that the kernel lacks.
    """
    (batch, heads, rank), size = q_latent_BHR.shape, latent_pages_ZSR.shape[1]
    reason = unsupported_reason(size, rank, q_rope_BHP.shape[-1])
    if reason is not None:
        raise NotImplementedError(reason)
    block = choose_block(heads, size, is_int8=latent_scales_ZS is not None)
    blocks = pl.cdiv(heads, block.heads)
    parts = num_parts(PROGRAMS, batch * blocks, tables_BN.shape[1])
    walk = Walk(size, block.positions, window_size, num_sink_tokens, parts)
    run = backend.triton_call(
        functools.partial(_kernel, walk=walk, rows=block.heads, scale=scale),
        name="paged_latent_attention" + ("" if latent_scales_ZS is None else "_int8"),
        num_programs=batch * blocks * parts,
        out_shape=sums_shapes(batch, parts, heads, rank),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        target=target,
    )
    pages = (latent_pages_ZSR, rope_pages_ZSP, latent_scales_ZS)
    sums = run(q_latent_BHR, q_rope_BHP, *pages, tables_BN, lengths_B)
    return added(sums).astype(q_latent_BHR.dtype)


def _kernel(
    q_latent_BHR,
    q_rope_BHP,
    latent_ZSR,
    rope_ZSP,
    scales_ZS,
    tables_BN,
    lengths_B,
    *out,
    walk,
    rows,
    scale,
):
    _, heads, rank = q_latent_BHR.shape
    # The blocks of heads of one part follow each other: they read the same latents.
    rest, block = divide(pl.program_id(0), pl.cdiv(heads, rows))
    batch, part = divide(rest, walk.parts)
    ours, is_head_M = pl.ds(block * rows, rows), edge(block * rows, rows, heads)
    q_latent_MR = read(q_latent_BHR, (batch, ours), rows, is_head_M)
    q_rope_MP = read(q_rope_BHP, (batch, ours), rows, is_head_M)

    def look(page, positions, is_seen_S):
        # Latents are values, too: what was never written must not be NaN.
        latent_SR = read(latent_ZSR, (page, positions), walk.block_size, is_seen_S)
        latent_SR = widened(latent_SR, q_latent_MR.dtype)
        rope_SP = read(rope_ZSP, (page, positions), walk.block_size)
        scores_MS, scales_1S = dot(q_latent_MR, latent_SR.T), None
        if scales_ZS is not None:
            scales_S = load(scales_ZS.at[page, positions], is_seen_S)
            scales_1S = scales_S.astype(jnp.float32)[None]
            scores_MS *= scales_1S
        scores_MS = (scores_MS + dot(q_rope_MP, rope_SP.T)) * (LOG2_E * scale)

        def summed(weights_MS):
            if scales_1S is not None:
                weights_MS = weights_MS * scales_1S
            return dot(weights_MS.astype(latent_SR.dtype), latent_SR)

        return scores_MS, summed

    shape = (rows, rank)
    sums = softmax_over(walk, tables_BN, lengths_B, batch, part, shape=shape, look=look)
    write_sums(Sums(*out), sums, batch, part, ours, is_head_M)
