"""The signature of cached_attention, its checks, and the choice of an implementation.

T tokens, R rows (sequences), S slots of a row, P pages of Z positions, N pages of a row, H query
heads, G key/value heads, C head_dim, W width of values.
"""

from functools import partial
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from kernels import native
from kernels.backend import auto_takes_triton, current_target, require_triton
from kernels.cached_attention import cpu, pallas_triton, reference, xla
from kernels.cached_attention.state import Options, State

Implementation = Literal["auto", "reference", "xla", "cpu", "triton"]


def cached_attention(
    q_THC: jax.Array,
    k_RSGC: jax.Array,
    v_RSGW: jax.Array | None,
    rows_T: jax.Array,
    positions_T: jax.Array,
    slot_positions_RS: jax.Array | None,
    *,
    k_scales_RSG: jax.Array | None = None,
    v_scales_RSG: jax.Array | None = None,
    tables_RN: jax.Array | None = None,
    window_size: int | None = None,
    num_sink_tokens: int = 0,
    sink_logits_H: jax.Array | None = None,
    scale: float | None = None,
    value_width: int | None = None,
    score_cap: float | None = None,
    chunk_size: int | None = None,
    one_per_row: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Returns the attention of each token over its row's slots, [T, H, W] in q's dtype.

    The tokens' own keys and values are already written. A token at position i of row r sees the
    slots of r that hold positions j with 0 <= i - j < window_size or j < num_sink_tokens <= i, as
    in `window_attention`, with the same heads and sinks; one that sees nothing gets zero.

    Args:
      q_THC: float [T, H, C], the tokens of any rows in any order; those of one row that follow
        each other share its keys.
      k_RSGC: [R, S, G, C], float or int8; H must be a multiple of G. Or pages [P, Z, G, C].
      v_RSGW: as the keys, [R, S, G, W] or [P, Z, G, W]. None: the first value_width entries of
        the keys, which then have one head (the latents of DeepSeek-V2, 2024).
      rows_T: int32 [T], each in [0, R); -1: padding, whose result is zero.
      positions_T: int32 [T]; -1: padding.
      slot_positions_RS: int32 [R, S], the position that each slot holds, in any order; -1: empty.
        None for pages.
      k_scales_RSG, v_scales_RSG: float32 or bfloat16 [R, S, G] or [P, Z, G], of int8 keys and
        values (kernels/paged_attention's quantize_positions). None for float ones.
      tables_RN: int32 [R, N]: position p of row r lies in page tables[r, p // Z] at p % Z. Entries
        past the pages that the tokens see are not read. None for rows of slots.
      window_size, num_sink_tokens: None: all positions before the token's own.
      sink_logits_H: float32 [H]; see `window_attention`.
      scale: of scores; None: 1 / sqrt(C).
      value_width: W where v is None.
      score_cap: see `window_attention`.
      chunk_size: positions of a chunk (Llama 4, 2025): a token sees those of its own chunk alone,
        the positions j with j // chunk_size = i // chunk_size.
      one_per_row: the caller's word that T = R and rows are 0, 1, ..., R - 1 (one new token of
        each sequence), so that XLA and GPUs need not look for the tokens that share a row.
      implementation: "reference" copies a row's slots for each token; "xla" takes tiles of
        tokens; "cpu" is C++ that reads slots where they lie and never writes scores out (float32
        queries); "triton" is a GPU kernel that does the same, without a gradient; "auto" takes
        "triton" on a GPU (kernels/backend.py) and "cpu" in programs for the CPU, where they can,
        and "xla" elsewhere.
    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the implementation asked for can't do this here.
    Numerics: softmax in float32; float32 within 1e-5 of the reference. What a token does not see
      may hold anything, NaN included.
    """
    state = State(k_RSGC, v_RSGW, k_scales_RSG, v_scales_RSG, slot_positions_RS, tables_RN)
    _check_places(q_THC, rows_T, positions_T, state)
    _check_heads(q_THC, state, sink_logits_H, value_width)
    _check_scales("keys", k_RSGC, k_scales_RSG)
    if v_RSGW is not None:
        _check_scales("values", v_RSGW, v_scales_RSG)
    if one_per_row and len(q_THC) != state.num_rows:
        raise ValueError(
            f"one_per_row needs a token of each row, and {len(q_THC)} tokens of {state.num_rows} "
            "rows came"
        )
    options = Options(
        window_size=window_size,
        num_sink_tokens=num_sink_tokens if window_size is not None else 0,
        scale=q_THC.shape[-1] ** -0.5 if scale is None else scale,
        value_width=v_RSGW.shape[-1] if v_RSGW is not None else value_width or 0,
        one_per_row=one_per_row,
        score_cap=score_cap,
        chunk_size=chunk_size,
    )
    rows_T, positions_T = rows_T.astype(jnp.int32), positions_T.astype(jnp.int32)
    operands = (q_THC, rows_T, positions_T, state, sink_logits_H)
    return _run(implementation, options, operands)


def _run(implementation: Implementation, options: Options, operands: tuple[Any, ...]) -> jax.Array:
    q_THC, _, _, state, _ = operands
    by_xla = partial(xla.cached_attention, options=options)
    by_cpu = partial(cpu.cached_attention, options=options)
    by_triton = partial(pallas_triton.cached_attention, options=options, target=current_target())
    reason = options.unsupported_reason or cpu.unsupported_reason(q_THC, state)
    match implementation:
        case "reference":
            return reference.cached_attention(*operands, options=options)
        case "xla":
            return by_xla(*operands)
        case "cpu":
            if reason is not None:
                raise NotImplementedError(reason)
            return by_cpu(*operands)
        case "triton":
            require_triton(current_target())
            if options.unsupported_reason is not None:
                raise NotImplementedError(options.unsupported_reason)
            return by_triton(*operands)
        case "auto":
            can_triton = pallas_triton.unsupported_reason(q_THC, state) is None
            can_triton &= options.unsupported_reason is None
            can_triton &= not pallas_triton.is_slower(q_THC, state)
            if can_triton and auto_takes_triton(current_target()):
                return by_triton(*operands)
            if reason is None and native.is_used_for(q_THC):
                return lax.platform_dependent(*operands, cpu=by_cpu, default=by_xla)
            return by_xla(*operands)
        case _:
            assert_never(implementation)


def _check_places(
    q_THC: jax.Array, rows_T: jax.Array, positions_T: jax.Array, state: State
) -> None:
    """Where tokens stand and where slots lie."""
    if q_THC.ndim != 3 or rows_T.shape != q_THC.shape[:1] or positions_T.shape != rows_T.shape:
        raise ValueError(
            f"q {q_THC.shape}, rows {rows_T.shape} and positions {positions_T.shape} must be "
            "[T, H, C], [T] and [T]"
        )
    slots, tables = state.slot_positions_RS, state.tables_RN
    if (slots is None) == (tables is None):
        came = "neither" if slots is None else "both"
        raise ValueError(
            f"a state has slot_positions (rows of slots) or tables (pages), and {came} came"
        )
    if slots is not None and (slots.ndim != 2 or state.k.shape[:2] != slots.shape):
        raise ValueError(
            f"keys {state.k.shape} and slot_positions {slots.shape} must be [R, S, G, C] and [R, S]"
        )
    if tables is not None and tables.ndim != 2:
        raise ValueError(f"tables {tables.shape} must be [R, N]")


def _check_heads(
    q_THC: jax.Array, state: State, sink_logits_H: jax.Array | None, value_width: int | None
) -> None:
    """Heads and widths of queries, keys, values and sinks."""
    (_, heads, width), k, v = q_THC.shape, state.k, state.v
    if k.ndim != 4 or k.shape[3] != width:
        raise ValueError(f"q {q_THC.shape} and keys {k.shape} must be [T, H, C] and [R, S, G, C]")
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads must be a multiple of {k.shape[2]} key/value heads")
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"keys {k.shape} and values {v.shape} must agree but for their widths")
    if v is not None and value_width is not None:
        raise ValueError(f"value_width={value_width} is for a state without values: leave it out")
    if v is None and (k.shape[2] != 1 or value_width is None or not 0 < value_width <= width):
        raise ValueError(
            f"a state without values needs one key head and value_width in 1..{width}, and "
            f"{k.shape[2]} heads and value_width={value_width} came"
        )
    if v is None and state.v_scales is not None:
        raise ValueError("a state without values has no v_scales: those of the keys hold")
    if sink_logits_H is not None and sink_logits_H.shape != (heads,):
        raise ValueError(
            f"sink_logits {sink_logits_H.shape} must be one per query head, ({heads},)"
        )


def _check_scales(what: str, x: jax.Array, scales: jax.Array | None) -> None:
    """A scale of every position and head where they are int8, none where they are float."""
    if x.dtype != jnp.int8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{what} are {x.dtype}, and must be float or int8 with scales")
    needed = x.shape[:3] if x.dtype == jnp.int8 else None
    came = None if scales is None else scales.shape
    if came != needed:
        raise ValueError(f"{what} of {x.dtype} need scales of shape {needed}, got {came}")
