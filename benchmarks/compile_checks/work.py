"""Least work of each case: FLOPs, and bytes to and from memory.

The bytes are the operands that are used and the results, each once, however the work is done. Of a
gradient's kernel the FLOPs include the scores that it makes again. Gathered rows count as often as
they are gathered.
"""

from typing import NamedTuple

import numpy as np

from kernels.cached_attention.cases import CompiledCase as CachedCase
from kernels.grouped_matmul.cases import CompiledCase as GroupedCase
from kernels.paged_attention.cases import CompiledCase as PagedCase
from kernels.paged_attention.cases import CompiledLatentCase as LatentCase
from kernels.quantize import FORMATS
from kernels.window_attention.cases import CompiledCase as WindowCase


class Work(NamedTuple):
    flops: float
    """Multiplications and additions of the products."""
    least_bytes: float


# --- Grouped products ----------------------------------------------------------------------------


def group_sizes(case: GroupedCase) -> np.ndarray:
    """Each row's expert drawn by lot."""
    even = np.full(case.num_groups, 1.0 / case.num_groups)
    return np.random.RandomState(0).multinomial(case.rows, even)


def itemsize(case: GroupedCase) -> int:
    """Of rows and results that are not in fp8."""
    return 4 if case.format == "float32" else 2


def bytes_per_input(case: GroupedCase) -> float:
    """Of the left operand's rows, with their scales."""
    return 1 + 4 / 128 if case.fp8_rows else itemsize(case)


def bytes_per_weight(case: GroupedCase) -> float:
    """With its share of a scale."""
    if case.format in ("bf16", "float32"):
        return itemsize(case)
    return FORMATS[case.format].bits / 8 + 4 / 128


def grouped(case: GroupedCase) -> Work:
    matrices = 2 if case.gated else 1
    used = int((group_sizes(case) > 0).sum())
    weights = used * matrices * case.d_in * case.d_out * bytes_per_weight(case)
    x, y = case.rows * case.d_in * bytes_per_input(case), case.rows * case.d_out * itemsize(case)
    if case.contraction == "gradient_w":  # of every matrix, zero where no row is
        weights = case.num_groups * matrices * case.d_in * case.d_out * itemsize(case)
    return Work(2.0 * case.rows * case.d_in * case.d_out * matrices, x + weights + y)


# --- Attention -----------------------------------------------------------------------------------


def visible_pairs(case: WindowCase) -> int:
    """Pairs of a query and a key that it sees, of one document that fills the row."""
    position = np.arange(case.length, dtype=np.int64)
    if case.window_size is None:
        return int((position + 1).sum())
    in_window = np.minimum(position + 1, case.window_size)
    sinks = np.minimum(np.maximum(position + 1 - case.window_size, 0), case.num_sink_tokens)
    return int((in_window + sinks).sum())


def window(case: WindowCase) -> Work:
    value_dim = case.value_dim or case.head_dim
    size = 2 if case.dtype == "bfloat16" else 4
    queries, keys = case.length * case.num_heads, case.length * case.num_kv_heads
    q, out = queries * case.head_dim * size, queries * value_dim * size
    k, v = keys * case.head_dim * size, keys * value_dim * size
    of_rows, log_sums = 4 * 4 * case.length, 4 * queries
    products = {  # widths of those that each visible pair takes part in
        "forward": case.head_dim + value_dim,
        "gradient_q": 2 * case.head_dim + value_dim,
        "gradient_kv": 2 * case.head_dim + 2 * value_dim,
    }[case.kernel]
    moved = {
        "forward": q + k + v + out + log_sums,
        "gradient_q": q + k + v + out + 2 * log_sums + q,
        "gradient_kv": q + k + v + out + 2 * log_sums + k + v,
    }[case.kernel]
    return Work(2.0 * visible_pairs(case) * case.num_heads * products, moved + of_rows)


def lengths(case: PagedCase | LatentCase) -> np.ndarray:
    """Drawn between half of what the tables hold and all of it."""
    most = case.max_pages * case.page_size
    return np.random.RandomState(0).randint(most // 2, most + 1, case.batch)


def seen_positions(case: PagedCase | LatentCase) -> int:
    """Of all sequences together."""
    if case.window_size is None:
        return int(lengths(case).sum())
    sinks = np.clip(lengths(case) - case.window_size, 0, case.num_sink_tokens)
    return int((np.minimum(lengths(case), case.window_size) + sinks).sum())


def bytes_per_position(case: PagedCase | LatentCase) -> float:
    """Of what the pages hold of one position, with scales."""
    size, scale = (1, 4) if case.pages == "int8" else (2, 0)
    if isinstance(case, LatentCase):
        return case.latent_rank * size + scale + case.rope_head_dim * 2
    return 2 * case.num_kv_heads * (case.head_dim * size + scale)


def paged(case: PagedCase | LatentCase) -> Work:
    if isinstance(case, LatentCase):
        q_width, out_width = case.latent_rank + case.rope_head_dim, case.latent_rank
    else:
        q_width = out_width = case.head_dim
    heads, seen = case.batch * case.num_heads, seen_positions(case)
    tables = 4 * case.batch * (case.max_pages + 1)
    moved = seen * bytes_per_position(case) + 2 * heads * (q_width + out_width) + tables
    return Work(2.0 * seen * case.num_heads * (q_width + out_width), moved)


# --- Cached attention ----------------------------------------------------------------------------


def held_positions(case: CachedCase) -> np.ndarray:
    """The position in each slot, int32 [R, S], -1 in none: in rings the sinks and the newest.

    Rows hold between half of their slots and all, rings between two and four times as many.
    """
    most = case.length * (4 if case.window_size is not None else 1)
    lengths = np.random.RandomState(0).randint(most // 2, most + 1, case.num_rows)
    if case.window_size is None:
        slots = np.arange(case.length, dtype=np.int32)[None]
        return np.where(slots < lengths[:, None], slots, -1)
    held = np.zeros((case.num_rows, case.length), np.int32)
    held[:] = np.arange(case.length)
    sinks = case.num_sink_tokens
    for row, length in enumerate(lengths):
        newest = np.arange(length - (case.length - sinks), length, dtype=np.int32)
        held[row, sinks + (newest - sinks) % (case.length - sinks)] = newest
    return held


def asking_tokens(case: CachedCase) -> tuple[np.ndarray, np.ndarray]:
    """Rows and positions of the tokens, int32 [T]: each row's last one, and where there are more
    of them than rows, the chunk of a prompt that ends with row 0's.
    """
    last_R = held_positions(case).max(axis=1)
    chunk = max(case.num_tokens - case.num_rows, 0)
    rows_T = np.r_[np.zeros(chunk, np.int64), np.arange(case.num_rows)]
    before_T = np.maximum(chunk - np.arange(len(rows_T)), 0)
    return rows_T.astype(np.int32), (last_R[rows_T] - before_T).astype(np.int32)


def cached(case: CachedCase) -> Work:
    held_RS, (rows_T, positions_T) = held_positions(case), asking_tokens(case)
    distance_TS = positions_T[:, None] - held_RS[rows_T]
    is_seen_TS = (distance_TS >= 0) & (held_RS[rows_T] >= 0)
    if case.window_size is not None:
        in_window_TS = distance_TS < case.window_size
        is_seen_TS &= in_window_TS | (held_RS[rows_T] < case.num_sink_tokens)
    read = sum(int(is_seen_TS[rows_T == row].any(axis=0).sum()) for row in range(case.num_rows))
    size, of_state = (4 if case.dtype == "float32" else 2), 1 if case.is_int8 else 0
    value_width, tensors = case.value_width or case.head_dim, 1 if case.value_width else 2
    of_slot = tensors * case.num_kv_heads * (case.head_dim * (of_state or size) + 4 * of_state)
    of_query = size * (case.head_dim + value_width)
    queries = case.num_tokens * case.num_heads
    places = 4 * (case.num_rows * (case.length // (case.page_size or 1)) + 2 * case.num_tokens)
    flops = 2.0 * int(is_seen_TS.sum()) * case.num_heads * (case.head_dim + value_width)
    return Work(flops, read * of_slot + queries * of_query + places)
