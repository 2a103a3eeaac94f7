"""Arrays for a case, drawn on the device, and what its program must compute from them.

The expected results are float32, by each op's own XLA implementation or reference, which the tests
hold to the equations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compile_checks import work
from benchmarks.gpu.roofline import Case
from kernels.cached_attention import cases as cached_cases
from kernels.cached_attention import xla as cached_xla
from kernels.cached_attention.state import State
from kernels.grouped_matmul import cases as grouped_cases
from kernels.grouped_matmul import xla as grouped_xla
from kernels.grouped_matmul.pallas_triton import swiglu_of_halves
from kernels.grouped_matmul.scaled_rows import ScaledRows, scale_rows, unscale_rows
from kernels.paged_attention import cases as paged_cases
from kernels.paged_attention import quantize_positions
from kernels.paged_attention import reference as paged_reference
from kernels.quantize import QTensor, dequantize, quantize, repack
from kernels.window_attention import cases as window_cases
from kernels.window_attention import xla as window_xla

Operands = tuple[Any, ...]
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Options of references' compilation: trying products out takes longer than running them once."""


def draw(case: Case) -> Operands:
    """The operands of the case's program (compile_checks/cases.py), in its order."""
    if isinstance(case, grouped_cases.CompiledCase):
        return _draw_grouped(case)
    if isinstance(case, window_cases.CompiledCase):
        return _draw_window(case)
    if isinstance(case, cached_cases.CompiledCase):
        return _draw_cached(case)
    return _draw_latent(case) if _is_latent(case) else _draw_paged(case)


def expected(case: Case, operands: Operands) -> Any:
    """What the case's program should return for them, float32."""
    with jax.default_matmul_precision("highest"):
        if isinstance(case, grouped_cases.CompiledCase):
            function = _expect_grouped(case)
        elif isinstance(case, window_cases.CompiledCase):
            function = _expect_window(case)
        elif isinstance(case, cached_cases.CompiledCase):
            function = cached_by_xla(case, jnp.float32)
        else:
            function = _expect_latent(case) if _is_latent(case) else _expect_paged(case)
        options: Any = {} if jax.default_backend() == "cpu" else UNTUNED
        compiled = jax.jit(function).lower(*operands).compile(compiler_options=options)
        return jax.block_until_ready(compiled(*operands))


def error(found: Any, wanted: Any) -> float:
    """The largest difference, in parts of the largest value that is wanted."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(_difference(ours, theirs)) for ours, theirs in pairs)


@jax.jit
def _difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    difference = jnp.abs(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).max()
    return difference / jnp.abs(theirs.astype(jnp.float32)).max()


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0):
    return _drawn(seed, shape, jnp.dtype(dtype), scale)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _drawn(seed: int, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale).astype(dtype)


def _is_latent(case: Case) -> bool:
    return isinstance(case, paged_cases.CompiledLatentCase)


# --- grouped_matmul ------------------------------------------------------------------------------


def _draw_grouped(case: grouped_cases.CompiledCase) -> Operands:
    dtype = jnp.float32 if case.format == "float32" else jnp.bfloat16
    columns = case.d_out * (2 if case.gated else 1)
    num_tokens = case.rows // 6 if case.gathered else case.rows
    x: Any = _normal(0, (num_tokens, case.d_in), dtype)
    weight: Any = _normal(1, (case.num_groups, case.d_in, columns), dtype, case.d_in**-0.5)
    if case.format not in ("bf16", "float32"):
        rounded = jax.jit(quantize, static_argnums=1)(weight, case.format)
        is_split = case.format == "int4" and case.compiler == "triton"
        weight = repack(rounded, "split_128") if is_split else rounded
    sizes = jnp.asarray(work.group_sizes(case), jnp.int32)
    rows = None
    if case.gathered:
        rows = jax.random.randint(jax.random.key(2), (case.rows,), 0, num_tokens, jnp.int32)
    operands = (scale_rows(x) if case.fp8_rows else x, weight, sizes, rows)
    if case.contraction == "forward":
        return operands
    return (*operands, _normal(3, (case.rows, case.d_out), dtype))


def _expect_grouped(case: grouped_cases.CompiledCase) -> Callable[..., Any]:
    def forward(x, weight, sizes, rows):
        y = grouped_xla.grouped_matmul(x if rows is None else x[rows], weight, sizes)
        return swiglu_of_halves(y) if case.gated else y

    def function(x, weight, sizes, rows, dy=None):
        x = unscale_rows(x) if isinstance(x, ScaledRows) else x.astype(jnp.float32)
        wide = dequantize(weight) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
        if dy is None:
            return forward(x, wide, sizes, rows)
        dy = dy.astype(jnp.float32)
        if case.contraction == "gradient_x":
            return jax.vjp(lambda x: forward(x, wide, sizes, rows), x)[1](dy)
        assert case.contraction == "gradient_w"
        return jax.vjp(lambda w: forward(x, w, sizes, rows), wide)[1](dy)

    return function


# --- window_attention ----------------------------------------------------------------------------


def _draw_window(case: window_cases.CompiledCase) -> Operands:
    value_dim, dtype = case.value_dim or case.head_dim, jnp.dtype(case.dtype)
    q = _normal(0, (1, case.length, case.num_heads, case.head_dim), dtype)
    k = _normal(1, (1, case.length, case.num_kv_heads, case.head_dim), dtype)
    v = _normal(2, (1, case.length, case.num_kv_heads, value_dim), dtype)
    positions = jnp.arange(case.length, dtype=jnp.int32)[None]
    sinks = _normal(3, (case.num_heads,), jnp.float32) if case.sink_logits else None
    operands = (q, k, v, positions, jnp.zeros_like(positions), sinks)
    if case.kernel == "forward":
        return operands
    return (*operands, _normal(4, (1, case.length, case.num_heads, value_dim), dtype))


def _expect_window(case: window_cases.CompiledCase) -> Callable[..., Any]:
    reach = {
        "window_size": case.window_size,
        "num_sink_tokens": case.num_sink_tokens,
        "gaps": False,
    }

    def function(q, k, v, positions, segments, sinks, dout=None):
        def forward(q, k, v):
            return window_xla.window_attention(
                q, k, v, positions, segments, sink_logits_H=sinks, **reach
            )

        rows = tuple(x.astype(jnp.float32) for x in (q, k, v))
        if dout is None:
            return forward(*rows)
        dq, dk, dv = jax.vjp(forward, *rows)[1](dout.astype(jnp.float32))
        return {"gradient_q": (dq,), "gradient_kv": (dk, dv)}[case.kernel]

    return function


# --- Pages ---------------------------------------------------------------------------------------


def _draw_pages(case: paged_cases.CompiledCase | paged_cases.CompiledLatentCase) -> Operands:
    """Tables, whose sequences share no page and find theirs anywhere, and lengths."""
    order = np.random.RandomState(1).permutation(case.num_pages).astype(np.int32)
    lengths = jnp.asarray(work.lengths(case), jnp.int32)
    return jnp.asarray(order.reshape(case.batch, case.max_pages)), lengths


def _draw_paged(case: Any) -> Operands:
    pages = (case.num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    q, k, v = (
        _normal(0, (case.batch, case.num_heads, case.head_dim)),
        *map(_pool, (1, 2), [pages] * 2),
    )
    k_scales = v_scales = None
    if case.pages == "int8":
        (k, k_scales), (v, v_scales) = (jax.jit(quantize_positions)(x) for x in (k, v))
    return (q, k, v, *_draw_pages(case), k_scales, v_scales)


def _pool(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Pages, without a float32 copy of them."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))()


def _expect_paged(case: Any) -> Callable[..., Any]:
    reach = {
        "window_size": case.window_size,
        "num_sink_tokens": case.num_sink_tokens,
        "sink_logits_H": None,
    }

    def function(q, k, v, tables, lengths, k_scales, v_scales):
        scales = {"k_scales_PSG": k_scales, "v_scales_PSG": v_scales}
        operands = (q.astype(jnp.float32), k, v, tables, lengths)
        return paged_reference.paged_attention(*operands, **scales, **reach)

    return function


def _draw_latent(case: Any) -> Operands:
    heads, pages = (case.batch, case.num_heads), (case.num_pages, case.page_size)
    latent, scales = _pool(2, (*pages, case.latent_rank)), None
    if case.pages == "int8":
        latent, scales = jax.jit(quantize_positions)(latent)
    return (
        _normal(0, (*heads, case.latent_rank)),
        _normal(1, (*heads, case.rope_head_dim)),
        latent,
        _pool(3, (*pages, case.rope_head_dim)),
        *_draw_pages(case),
        scales,
    )


def _expect_latent(case: Any) -> Callable[..., Any]:
    settings = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}
    settings["scale"] = (case.nope_head_dim + case.rope_head_dim) ** -0.5

    def function(q_latent, q_rope, latent, rope, tables, lengths, scales):
        queries = (q_latent.astype(jnp.float32), q_rope.astype(jnp.float32))
        operands = (*queries, latent, rope, tables, lengths)
        return paged_reference.paged_latent_attention(
            *operands, latent_scales_ZS=scales, **settings
        )

    return function


# --- cached_attention ----------------------------------------------------------------------------


def _draw_cached(case: cached_cases.CompiledCase) -> Operands:
    dtype = jnp.dtype(case.dtype)
    q = _normal(0, (case.num_tokens, case.num_heads, case.head_dim), dtype)
    rows, positions = (jnp.asarray(x) for x in work.asking_tokens(case))
    slots = tables = None
    size = case.page_size or case.length
    pages = case.length // size
    if case.page_size is None:
        slots = jnp.asarray(work.held_positions(case))
    else:
        order = np.random.RandomState(1).permutation(case.num_rows * pages).astype(np.int32)
        tables = jnp.asarray(order.reshape(case.num_rows, pages))
    shape = (case.num_rows * pages, size, case.num_kv_heads, case.head_dim)
    k, v = _pool(1, shape), None if case.value_width else _pool(2, shape)
    k, k_scales = _stored(k, case)
    v, v_scales = (None, None) if v is None else _stored(v, case)
    return q, rows, positions, State(k, v, k_scales, v_scales, slots, tables)


def _stored(x: jax.Array, case: cached_cases.CompiledCase) -> tuple[jax.Array, jax.Array | None]:
    """As the state holds it, with scales where they are int8."""
    if case.is_int8:
        return jax.jit(quantize_positions)(x)
    return x.astype(case.dtype), None


def cached_by_xla(case: cached_cases.CompiledCase, dtype: Any) -> Callable[..., Any]:
    """XLA's implementation with queries in a dtype."""

    def function(q, rows, positions, state):
        return cached_xla.cached_attention(
            q.astype(dtype), rows, positions, state, None, options=case.options
        )

    return function
