"""The cases of every op as functions and the shapes of their operands."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compile_checks import attention_traffic, traffic
from benchmarks.compile_checks.devices import Device
from kernels.backend import Target
from kernels.cached_attention import cases as cached_cases
from kernels.cached_attention import pallas_triton as cached
from kernels.cached_attention.state import State
from kernels.grouped_matmul import cases as grouped_cases
from kernels.grouped_matmul import pallas_mosaic as grouped_mosaic
from kernels.grouped_matmul import pallas_mosaic_quantized as quantized_mosaic
from kernels.grouped_matmul import pallas_triton as grouped
from kernels.grouped_matmul import pallas_triton_quantized as quantized
from kernels.grouped_matmul.scaled_rows import scale_rows
from kernels.grouped_matmul.tiles import Tiles
from kernels.paged_attention import cases as paged_cases
from kernels.paged_attention import pallas_triton as paged
from kernels.paged_attention import pallas_triton_latent as latent
from kernels.quantize import FORMATS, QTensor
from kernels.window_attention import cases as window_cases
from kernels.window_attention import pallas_mosaic as window_mosaic
from kernels.window_attention import pallas_triton as window


@dataclass(frozen=True)
class Program:
    """What is compiled for a case on one device."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    """Trees of ShapeDtypeStruct."""
    kernel: str
    """Name of the kernel that the case is about, which may not be the only one."""
    weight_elements: int = 0
    """Of the quantised weights, which must not appear widened."""
    rows_of_dot: int = 64
    """Rows of the tensor cores' left operand: Hopper's wgmma takes 64 and more."""
    has_tensor_cores: bool = True
    has_fp8_products: bool = False
    plain_loads: int = 16
    """Most loads from global memory into registers: of tables and scales. A weight that is loaded
    so takes dozens (int4 by its own type: 129)."""
    model_traffic: Callable[[], float | None] = lambda: None
    """Models `traffic`, which takes up to a second."""
    most_traffic: float = 1.15
    most_spilled: int = 0

    @property
    def traffic(self) -> float | None:
        """Bytes moved over the least that any order needs, by traffic.py and
        attention_traffic.py.
        """
        return self.model_traffic()


NAMES = [f"grouped_matmul/{name}" for name in grouped_cases.COMPILED]
NAMES += [f"window_attention/{name}" for name in window_cases.COMPILED]
NAMES += [f"paged_attention/{name}" for name in paged_cases.COMPILED]
NAMES += [f"paged_latent_attention/{name}" for name in paged_cases.COMPILED_LATENT]
NAMES += [f"cached_attention/{name}" for name in cached_cases.COMPILED]


def runs_on(name: str, device: Device) -> bool:
    """Whether the case is for such a device: products in fp8, and Mosaic's kernels, need Hopper."""
    op, case = name.split("/")
    needs_hopper = False
    if op == "window_attention":
        needs_hopper = window_cases.COMPILED[case].compiler == "mosaic"
    if op == "grouped_matmul":
        compiled = grouped_cases.COMPILED[case]
        needs_hopper = compiled.fp8_rows or compiled.compiler == "mosaic"
    return device.target.capability >= 90 or not needs_hopper


def program(name: str, device: Device, sizes: Any = None) -> Program:
    """Returns a case's program, with other sizes than its kernel would choose where given.

    Args:
      sizes: Tiles of grouped_matmul; of window_attention Kernels, or Blocks where its compiler is
        Mosaic; Sizes of cached_attention. None: chosen by the kernel.
    """
    op, case = name.split("/")
    if op == "cached_attention":
        return _cached_attention(cached_cases.COMPILED[case], device, sizes)
    if op == "paged_attention":
        return _paged_attention(paged_cases.COMPILED[case], device)
    if op == "paged_latent_attention":
        return _paged_latent_attention(paged_cases.COMPILED_LATENT[case], device)
    if op == "window_attention":
        return _window_attention(window_cases.COMPILED[case], device, sizes)
    return _grouped_matmul(grouped_cases.COMPILED[case], device, sizes)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _grouped_matmul(
    case: grouped_cases.CompiledCase, device: Device, tiles: Tiles | None
) -> Program:
    target = device.target
    plain_loads = 48 if case.fp8_rows else 16  # a scale of each row
    if case.compiler == "mosaic" and case.format == "bf16":
        plain_loads = 24  # of tables, for the first place and for each next one
    dtype = jnp.float32 if case.format == "float32" else jnp.bfloat16
    columns = case.d_out * (2 if case.gated else 1)
    num_tokens = case.rows // 6 if case.gathered else case.rows
    x, sizes = _array((num_tokens, case.d_in), dtype), _array((case.num_groups,), jnp.int32)
    if case.fp8_rows:
        x = jax.eval_shape(scale_rows, x)
    rows = _array((case.rows,), jnp.int32) if case.gathered else None
    dy = _array((case.rows, case.d_out), dtype)
    is_quantized = case.format not in ("bf16", "float32")
    if is_quantized:
        weight = _quantized_weight(case, columns)
    else:
        weight = _array((case.num_groups, case.d_in, columns), dtype)

    def forward(x, weight, sizes, rows):
        settings = {"rows_R": rows, "target": target, "tiles": tiles}
        if is_quantized:
            op = quantized_mosaic if case.compiler == "mosaic" else quantized
            return op.grouped_matmul(x, weight, sizes, gated=case.gated, **settings)
        if case.compiler == "mosaic":
            return grouped_mosaic.grouped_matmul(x, weight, sizes, **settings)
        if case.gated:
            return grouped.grouped_swiglu(x, weight, sizes, **settings)
        return grouped.grouped_matmul(x, weight, sizes, **settings, gradient_tiles=tiles)

    def gradient(x, weight, sizes, rows, dy):
        if case.contraction == "gradient_x":
            return jax.vjp(lambda x: forward(x, weight, sizes, rows), x)[1](dy)
        assert case.contraction == "gradient_w"
        return jax.vjp(lambda w: forward(x, w, sizes, rows), weight)[1](dy)

    is_forward = case.contraction == "forward"
    used = tiles or traffic.tiles_of(case, target)
    return Program(
        forward if is_forward else gradient,
        (x, weight, sizes, rows) if is_forward else (x, weight, sizes, rows, dy),
        kernel=_kernel_name(case),
        weight_elements=case.num_groups * case.d_in * columns if is_quantized else 0,
        rows_of_dot=used.columns if is_quantized and is_forward else used.rows,
        has_tensor_cores=dtype == jnp.bfloat16,
        has_fp8_products=case.fp8_rows,
        plain_loads=plain_loads,
        model_traffic=partial(traffic.ratio, case, used, device),
        most_traffic=case.most_traffic,
    )


def _kernel_name(case: grouped_cases.CompiledCase) -> str:
    suffix = {"forward": "", "gradient_x": "_dx", "gradient_w": "_dw"}[case.contraction]
    is_quantized = case.format not in ("bf16", "float32")
    suffix += f"_{case.format}" if is_quantized else ""
    prefix = "mosaic_" if case.compiler == "mosaic" else ""
    return f"{prefix}grouped_matmul{suffix}" + ("_rows" if case.fp8_rows else "")


def _quantized_weight(case: grouped_cases.CompiledCase, columns: int) -> QTensor:
    assert case.format not in ("bf16", "float32")
    spec = FORMATS[case.format]
    stored = case.d_in * spec.bits // (8 * spec.dtype.itemsize)
    return QTensor(
        _array((case.num_groups, columns, stored), spec.dtype),  # pyright: ignore[reportArgumentType]
        _array((case.num_groups, case.d_in // 128, columns), jnp.float32),  # pyright: ignore[reportArgumentType]
        case.format,
        128,
        "split_128" if case.format == "int4" and case.compiler == "triton" else "canonical",
    )


_SUFFIXES = {"forward": "", "gradient_q": "_dq", "gradient_kv": "_dkv"}


def _window_attention(case: window_cases.CompiledCase, device: Device, sizes: Any) -> Program:
    target = device.target
    dtype = jnp.dtype(case.dtype)
    value_dim = case.value_dim or case.head_dim
    q = _array((1, case.length, case.num_heads, case.head_dim), dtype)
    k = _array((1, case.length, case.num_kv_heads, case.head_dim), dtype)
    v = _array((1, case.length, case.num_kv_heads, value_dim), dtype)
    dout = _array((1, case.length, case.num_heads, value_dim), dtype)
    row = _array((1, case.length), jnp.int32)
    sinks = _array((case.num_heads,), jnp.float32) if case.sink_logits else None

    def forward(q, k, v, positions, segments, sinks):
        reach = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}
        settings = {"sink_logits_H": sinks, "target": target, **reach}
        operands = (q, k, v, positions, segments)
        if case.compiler == "mosaic":
            return window_mosaic.window_attention(*operands, **settings, blocks=sizes)
        return window.window_attention(*operands, **settings, kernels=sizes)

    def gradient(q, k, v, positions, segments, sinks, dout):
        rest = (positions, segments, sinks)
        if case.kernel == "gradient_q":
            return jax.vjp(lambda q: forward(q, k, v, *rest), q)[1](dout)
        assert case.kernel == "gradient_kv"
        return jax.vjp(lambda k, v: forward(q, k, v, *rest), k, v)[1](dout)

    operands = (q, k, v, row, row, sinks)
    prefix = "mosaic_" if case.compiler == "mosaic" else ""
    is_forward = case.kernel == "forward"
    return Program(
        forward if is_forward else gradient,
        operands if is_forward else (*operands, dout),
        kernel=f"{prefix}window_attention{_SUFFIXES[case.kernel]}",
        has_tensor_cores=dtype == jnp.bfloat16,
        plain_loads=80,  # queries, once; positions and segments, in two loops
        rows_of_dot=_rows_of_attention(case, dtype.itemsize, target),
        model_traffic=partial(attention_traffic.window_ratio, case, device),
        most_spilled=case.most_spilled,
        most_traffic=case.most_traffic,
    )


def _rows_of_attention(case: window_cases.CompiledCase, itemsize: int, target: Target) -> int:
    if case.compiler == "mosaic":
        return window_mosaic.HOPPER.queries
    kernels = window.choose_kernels(case.head_dim, itemsize, target)
    return {
        "forward": kernels.forward.queries,
        "gradient_q": kernels.queries.queries,
        "gradient_kv": kernels.keys.keys,
    }[case.kernel]


def _paged_attention(case: paged_cases.CompiledCase, device: Device) -> Program:
    target = device.target
    shape = (case.num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    is_int8 = case.pages == "int8"
    pages, scales = _array(shape, case.pages), _array(shape[:3], jnp.float32) if is_int8 else None
    operands = (
        _array((case.batch, case.num_heads, case.head_dim), jnp.bfloat16),
        pages,
        pages,
        _array((case.batch, case.max_pages), jnp.int32),
        _array((case.batch,), jnp.int32),
        scales,
        scales,
    )
    reach = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}

    def function(q, k, v, tables, lengths, k_scales, v_scales):
        scales = {"k_scales_PSG": k_scales, "v_scales_PSG": v_scales}
        operands = (q, k, v, tables, lengths)
        return paged.paged_attention(*operands, **scales, **reach, target=target)

    kernel = "paged_attention_int8" if is_int8 else "paged_attention"
    ratio = partial(attention_traffic.paged_ratio, case, device)
    return Program(function, operands, kernel=kernel, rows_of_dot=16, model_traffic=ratio)


def _paged_latent_attention(case: paged_cases.CompiledLatentCase, device: Device) -> Program:
    target = device.target
    heads, positions = (case.batch, case.num_heads), (case.num_pages, case.page_size)
    is_int8 = case.pages == "int8"
    operands = (
        _array((*heads, case.latent_rank), jnp.bfloat16),
        _array((*heads, case.rope_head_dim), jnp.bfloat16),
        _array((*positions, case.latent_rank), case.pages),
        _array((*positions, case.rope_head_dim), jnp.bfloat16),
        _array((case.batch, case.max_pages), jnp.int32),
        _array((case.batch,), jnp.int32),
        _array(positions, jnp.float32) if is_int8 else None,
    )
    scale = (case.nope_head_dim + case.rope_head_dim) ** -0.5
    reach = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}

    def function(*operands):
        *operands, scales = operands
        settings = {"latent_scales_ZS": scales, "scale": scale, **reach}
        return latent.paged_latent_attention(*operands, **settings, target=target)

    block = latent.choose_block(case.num_heads, case.page_size, is_int8=is_int8)
    return Program(
        function,
        operands,
        kernel="paged_latent_attention" + ("_int8" if is_int8 else ""),
        rows_of_dot=block.heads,
        plain_loads=80,  # queries, once
        model_traffic=partial(attention_traffic.paged_ratio, case, device),
    )


def _cached_attention(
    case: cached_cases.CompiledCase, device: Device, sizes: cached.Sizes | None
) -> Program:
    dtype, is_paged = jnp.dtype(case.dtype), case.page_size is not None
    pages = case.length // (case.page_size or case.length)
    places = (case.num_rows * pages, case.page_size or case.length, case.num_kv_heads)
    k: Any = _array((*places, case.head_dim), jnp.int8 if case.is_int8 else dtype)
    scales: Any = _array(places, jnp.float32) if case.is_int8 else None
    slots: Any = _array((case.num_rows, case.length), jnp.int32)
    tables: Any = _array((case.num_rows, pages), jnp.int32)
    k_and_v = (k, None, scales, None) if case.value_width else (k, k, scales, scales)
    state = State(*k_and_v, *((None, tables) if is_paged else (slots, None)))
    options = case.options
    q: Any = _array((case.num_tokens, case.num_heads, case.head_dim), dtype)
    token_T = _array((case.num_tokens,), jnp.int32)

    sizes = sizes or cached.choose_sizes(q, state, options, device.target)

    def function(q, rows, positions, state):
        operands = (q, rows, positions, state, None, options)
        return cached.cached_attention(*operands, target=device.target, sizes=sizes)

    return Program(
        function,
        (q, token_T, token_T, state),
        kernel="cached_attention" + ("_int8" if case.is_int8 else ""),
        rows_of_dot=cached.make_plan(q, state, options, sizes).num_queries,
        has_tensor_cores=dtype == jnp.bfloat16,
        plain_loads=80,  # queries, once; positions and scales
    )
