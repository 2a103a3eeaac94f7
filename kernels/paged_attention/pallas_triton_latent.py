"""paged_latent_attention as a Triton kernel: a program has some positions for a block of heads.

All heads read the same latents, so a block of heads is the rows of one product, and a latent that
is loaded serves twice: as the key of a score and as the value that it weighs.

B sequences, H query heads, R heads of a program, C latent_rank, E rope_head_dim, P pages of S
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
    lacks,
    num_parts,
    read,
    softmax_over,
    sums_shapes,
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
    q_latent_BHC: jax.Array,
    q_rope_BHE: jax.Array,
    latent_pages_PSC: jax.Array,
    rope_pages_PSE: jax.Array,
    tables_BN: jax.Array,
    lengths_B: jax.Array,
    *,
    latent_scales_PS: jax.Array | None = None,
    scale: float,
    window_size: int | None,
    num_sinks: int,
    target: Target,
) -> jax.Array:
    """Returns the latents summed by each head's weights, [B, H, C].

    Raises:
      NotImplementedError: pages of a size that the kernel lacks.
    """
    (batch, heads, rank), size = q_latent_BHC.shape, latent_pages_PSC.shape[1]
    lack = lacks(size, rank, q_rope_BHE.shape[-1])
    if lack is not None:
        raise NotImplementedError(lack)
    block = choose_block(heads, size, is_int8=latent_scales_PS is not None)
    blocks = pl.cdiv(heads, block.heads)
    parts = num_parts(PROGRAMS, batch * blocks, tables_BN.shape[1])
    walk = Walk(size, block.positions, window_size, num_sinks, parts)
    run = backend.triton_call(
        functools.partial(_kernel, walk=walk, rows=block.heads, scale=scale),
        name="paged_latent_attention" + ("" if latent_scales_PS is None else "_int8"),
        num_programs=batch * blocks * parts,
        out_shape=sums_shapes(batch, parts, heads, rank),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        target=target,
    )
    pages = (latent_pages_PSC, rope_pages_PSE, latent_scales_PS)
    sums = run(q_latent_BHC, q_rope_BHE, *pages, tables_BN, lengths_B)
    return added(sums).astype(q_latent_BHC.dtype)


def _kernel(
    q_latent_BHC,
    q_rope_BHE,
    latent_PSC,
    rope_PSE,
    scales_PS,
    tables_BN,
    lengths_B,
    *out,
    walk,
    rows,
    scale,
):
    _, heads, rank = q_latent_BHC.shape
    # The blocks of heads of one part follow each other: they read the same latents.
    rest, block = divide(pl.program_id(0), pl.cdiv(heads, rows))
    batch, part = divide(rest, walk.parts)
    ours, is_head_R = pl.ds(block * rows, rows), edge(block * rows, rows, heads)
    q_latent_RC = read(q_latent_BHC, (batch, ours), rows, is_head_R)
    q_rope_RE = read(q_rope_BHE, (batch, ours), rows, is_head_R)

    def look(page, positions, is_seen_S):
        # Latents are values, too: what was never written must not be NaN.
        latent_SC = read(latent_PSC, (page, positions), walk.block_size, is_seen_S)
        latent_SC = widened(latent_SC, q_latent_RC.dtype)
        rope_SE = read(rope_PSE, (page, positions), walk.block_size)
        scores_RS, scales_1S = dot(q_latent_RC, latent_SC.T), None
        if scales_PS is not None:
            scales_S = load(scales_PS.at[page, positions], is_seen_S)
            scales_1S = scales_S.astype(jnp.float32)[None]
            scores_RS *= scales_1S
        scores_RS = (scores_RS + dot(q_rope_RE, rope_SE.T)) * (LOG2_E * scale)

        def summed(weights_RS):
            if scales_1S is not None:
                weights_RS = weights_RS * scales_1S
            return dot(weights_RS.astype(latent_SC.dtype), latent_SC)

        return scores_RS, summed

    shape = (rows, rank)
    sums = softmax_over(walk, tables_BN, lengths_B, batch, part, shape=shape, look=look)
    write_sums(Sums(*out), sums, batch, part, ours, is_head_R)
