"""Bytes that the kernels of attention move, by the model of the L2 cache in traffic.py.

One document fills each row of window_attention. What a paged kernel leaves of each part of a
sequence is written, and read again by the sum over the parts.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import assert_never

import numpy as np

from benchmarks.compile_checks import work
from benchmarks.compile_checks.devices import Device
from benchmarks.compile_checks.traffic import Access, moved
from kernels.paged_attention import pallas_triton as paged_kernel
from kernels.paged_attention import pallas_triton_latent as latent_kernel
from kernels.paged_attention.cases import CompiledCase as PagedCase
from kernels.paged_attention.cases import CompiledLatentCase as LatentCase
from kernels.paged_attention.parts import num_parts
from kernels.window_attention import pallas_mosaic
from kernels.window_attention.cases import CompiledCase as WindowCase
from kernels.window_attention.pallas_triton import Blocks, choose_kernels

INT32 = FLOAT32 = 4


@functools.cache
def window_ratio(case: WindowCase, device: Device) -> float:
    """Bytes moved over the least."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    kernels = choose_kernels(case.head_dim, itemsize, device.target)
    if case.compiler == "mosaic":
        of_core = pallas_mosaic.COMPUTE_WARPGROUPS * pallas_mosaic.HOPPER.queries
        blocks = kernels.forward._replace(queries=of_core, keys=pallas_mosaic.HOPPER.keys)
        grid = _over_keys(case, blocks, itemsize)
    elif case.kernel == "gradient_kv":
        grid = _over_queries(case, kernels.keys, itemsize)
    elif case.kernel == "gradient_q":
        grid = _over_keys(case, kernels.queries, itemsize)
    elif case.kernel == "forward":
        grid = _over_keys(case, kernels.forward, itemsize)
    else:
        assert_never(case.kernel)
    return moved(grid, device) / work.window(case).least_bytes


def _over_keys(case: WindowCase, blocks: Blocks, itemsize: int) -> Iterator[Access]:
    """Blocks of queries from the last to the first, the heads of each together."""
    value_dim, size = case.value_dim or case.head_dim, blocks.keys
    is_forward = case.kernel == "forward"
    of_query = case.head_dim * itemsize
    of_key = (case.head_dim + value_dim) * itemsize
    for block in reversed(range(-(-case.length // blocks.queries))):
        first = block * blocks.queries
        rows = min(blocks.queries, case.length - first)
        for head in range(case.num_heads):
            kv_head = head // (case.num_heads // case.num_kv_heads)
            reads = {("q", head, block): rows * of_query, ("rows", "q", block): 4 * INT32 * rows}
            if not is_forward:
                reads["dout", head, block] = rows * (value_dim * itemsize + 2 * FLOAT32)
            for j in _blocks_of_keys(case, first, blocks):
                keys = min(size, case.length - j * size)
                reads["kv", kv_head, j] = keys * of_key
                reads["rows", "k", j] = 2 * INT32 * keys
            width = value_dim * itemsize + FLOAT32 if is_forward else of_query
            yield Access(reads, {("out", head, block): rows * width})


def _blocks_of_keys(case: WindowCase, first: int, blocks: Blocks) -> list[int]:
    """As the kernel's _over_keys counts them: up to the diagonal, and those of the sinks."""
    end = -(-min(first + blocks.queries, case.length) // blocks.keys)
    if case.window_size is None:
        return list(range(end))
    begin = max(0, first - case.window_size + 1) // blocks.keys
    sinks = min(-(-case.num_sink_tokens // blocks.keys), begin)
    return [*range(sinks), *range(begin, end)]


def _over_queries(case: WindowCase, blocks: Blocks, itemsize: int) -> Iterator[Access]:
    """Blocks of keys from the first to the last, the key/value heads of each together."""
    value_dim, group = case.value_dim or case.head_dim, case.num_heads // case.num_kv_heads
    of_key = (case.head_dim + value_dim) * itemsize
    of_query = of_key + 2 * FLOAT32
    for block, kv_head in itertools.product(
        range(-(-case.length // blocks.keys)), range(case.num_kv_heads)
    ):
        first = block * blocks.keys
        keys = min(blocks.keys, case.length - first)
        end = case.length
        if case.window_size is not None and first >= case.num_sink_tokens:
            end = min(end, first + keys - 1 + case.window_size)
        reads = {("kv", kv_head, block): keys * of_key, ("rows", "k", block): 4 * INT32 * keys}
        for i in range(first // blocks.queries, -(-end // blocks.queries)):
            rows = min(blocks.queries, case.length - i * blocks.queries)
            reads["rows", "q", i] = 2 * INT32 * rows
            for head in range(kv_head * group, (kv_head + 1) * group):
                reads["q", head, i] = rows * of_query
        yield Access(reads, {("dkv", kv_head, block): keys * of_key})


# --- Pages ---------------------------------------------------------------------------------------


@functools.cache
def paged_ratio(case: PagedCase | LatentCase, device: Device) -> float:
    """Bytes moved over the least, with what the parts leave for their sum."""
    if isinstance(case, LatentCase):
        block = latent_kernel.choose_block(
            case.num_heads, case.page_size, is_int8=case.pages == "int8"
        )
        of_sequence, positions = -(-case.num_heads // block.heads), block.positions
        programs, width = latent_kernel.PROGRAMS, case.latent_rank
    else:
        of_sequence, positions = case.num_kv_heads, case.page_size
        programs, width = paged_kernel.PROGRAMS, case.head_dim
    parts = num_parts(programs, case.batch * of_sequence, case.max_pages)
    grid = _over_pages(case, of_sequence, positions, parts)
    heads = case.batch * case.num_heads
    sums = heads * parts * (width + 2) * FLOAT32
    result = heads * width * 2
    return (moved(grid, device) + 2 * sums + result) / work.paged(case).least_bytes


def _over_pages(
    case: PagedCase | LatentCase, of_sequence: int, positions: int, parts: int
) -> Iterator[Access]:
    """Programs of a part of a sequence for some heads; a block of pages is read whole."""
    is_latent = isinstance(case, LatentCase)
    width = case.latent_rank + case.rope_head_dim if is_latent else case.head_dim
    of_block = work.bytes_per_position(case) * positions / (1 if is_latent else of_sequence)
    of_query = case.num_heads // of_sequence * width * 2
    tables = INT32 * (case.max_pages + 1)
    for batch, length in enumerate(work.lengths(case)):
        seen = _seen_blocks(case, int(length), positions)
        per_part = -(-len(seen) // parts)
        # The parts of a head follow each other, or the heads of a part where they share latents.
        for some, other in itertools.product(
            range(parts if is_latent else of_sequence), range(of_sequence if is_latent else parts)
        ):
            part, heads = (some, other) if is_latent else (other, some)
            reads: dict = {("q", batch, heads): of_query, ("tables", batch): tables}
            for block in seen[part * per_part : (part + 1) * per_part]:
                reads["pages", batch, None if is_latent else heads, block] = of_block
            yield Access(reads, {})


def _seen_blocks(case: PagedCase | LatentCase, length: int, positions: int) -> np.ndarray:
    end = -(-length // positions)
    if case.window_size is None:
        return np.arange(end)
    first = max(length - case.window_size, 0) // positions
    sinks = min(-(-case.num_sink_tokens // positions), first)
    return np.concatenate([np.arange(sinks), np.arange(first, end)])
