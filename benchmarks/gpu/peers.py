"""Peers that a case is timed against: XLA, cuBLAS, jax's own Pallas kernels, tokamax.

A peer does the useful work of the case, as near as it can: its name says what it leaves out. One
that can't run on the device is reported with what it said.

B sequences, H query heads, G key/value heads, C head_dim, L positions.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu.operands import Operands, cached_by_xla
from benchmarks.gpu.roofline import Case
from kernels.cached_attention import cases as cached_cases
from kernels.grouped_matmul import cases as grouped_cases
from kernels.grouped_matmul.pallas_triton import swiglu_of_halves
from kernels.grouped_matmul.scaled_rows import ScaledRows, unscale_rows
from kernels.paged_attention import cases as paged_cases
from kernels.paged_attention import reference as paged_reference
from kernels.quantize import QTensor, dequantize
from kernels.window_attention import cases as window_cases

PALLAS = "jax.experimental.pallas.ops.gpu"
MOST_SECONDS = 0.05
"""Of a peer, as estimated: lax.ragged_dot multiplies every row with every matrix on a GPU."""
ASSUMED_FLOPS = 400e12
MOST_SCORES = 2**32
"""Bytes of scores that XLA's attention may write out."""


class Peer(NamedTuple):
    """A function and its operands, trees of arrays."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]


def peers(case: Case, operands: Operands, capability: int) -> dict[str, Peer]:
    """Peers by name, none of which has been called.

    Args:
      capability: CUDA's compute capability times ten; 0: none.
    """
    if isinstance(case, grouped_cases.CompiledCase):
        return _of_grouped(case, operands, capability)
    if isinstance(case, window_cases.CompiledCase):
        return _of_window(case, operands, capability)
    if isinstance(case, cached_cases.CompiledCase):
        return {"xla, tiles of tokens": _bound(cached_by_xla(case, case.dtype), *operands)}
    if isinstance(case, paged_cases.CompiledLatentCase):
        return {"xla, pages gathered": _bound(_latent_xla(case), *operands)}
    return _of_paged(case, operands)


def _bound(function: Callable[..., Any], *operands: Any) -> Peer:
    return Peer(function, operands)


def _pallas(name: str) -> Any:
    """One of jax's modules of GPU kernels, which come and go with its versions."""
    return importlib.import_module(f"{PALLAS}.{name}")


def _tokamax() -> Any | None:
    found = importlib.util.find_spec("tokamax")
    return importlib.import_module("tokamax") if found else None


# --- grouped_matmul ------------------------------------------------------------------------------


def _of_grouped(
    case: grouped_cases.CompiledCase, operands: Operands, capability: int
) -> dict[str, Peer]:
    x, weight, sizes, rows, *dy = operands
    dtype = jnp.float32 if case.format == "float32" else jnp.bfloat16
    x = unscale_rows(x).astype(dtype) if isinstance(x, ScaledRows) else x
    x = x if rows is None else x[rows]
    plain = dequantize(weight, dtype.__name__) if isinstance(weight, QTensor) else weight
    found: dict[str, Peer] = {}
    if weight is not plain and case.rows <= 128 * case.num_groups:
        return found  # a product reads one matrix in bfloat16 where the case reads all of 8 bits
    if case.contraction == "gradient_x":
        found["one dense product"] = _bound(lambda dy, w: dy @ w.T, *dy, plain[0])
    elif case.contraction == "gradient_w":
        found["one dense product"] = _bound(lambda x, dy: x.T @ dy, x, *dy)
    elif case.contraction == "forward":
        found |= _forward_of_grouped(case, (x, plain, sizes), capability)
    else:
        assert_never(case.contraction)
    return found


def _forward_of_grouped(
    case: grouped_cases.CompiledCase, operands: Operands, capability: int
) -> dict[str, Peer]:
    x, plain, sizes = operands

    def after(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The product, and SwiGLU of what it made where the case has it."""
        return lambda *a: swiglu_of_halves(product(*a)) if case.gated else product(*a)

    found: dict[str, Peer] = {"one dense product": _bound(after(lambda x, w: x @ w), x, plain[0])}
    if plain.shape[0] * 2 * x.shape[0] * plain[0].size < MOST_SECONDS * ASSUMED_FLOPS:
        found["lax.ragged_dot"] = _bound(after(lax.ragged_dot), x, plain, sizes)
    if capability >= 90 and x.dtype == jnp.bfloat16:
        found["jax ragged_dot_mgpu"] = _bound(after(_ragged_dot_mgpu), x, plain, sizes)
    tokamax = _tokamax()
    if tokamax is not None:
        ragged = lambda x, w, sizes: tokamax.ragged_dot(x, w, group_sizes=sizes)  # noqa: E731
        found["tokamax.ragged_dot"] = _bound(after(ragged), x, plain, sizes)
    return found


def _ragged_dot_mgpu(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """With the tiles that tokamax' table has for an H100 most often (128 x 64 x 128, 4 steps)."""
    tiles = {"block_m": 128, "block_n": 64, "block_k": 128, "max_concurrent_steps": 4}
    ragged_dot = _pallas("ragged_dot_mgpu").ragged_dot
    return ragged_dot(x, w, group_sizes=sizes, **tiles, grid_block_n=1)


# --- window_attention ----------------------------------------------------------------------------


def _of_window(
    case: window_cases.CompiledCase, operands: Operands, capability: int
) -> dict[str, Peer]:
    q, k, v, _, _, _, *dout = operands
    window = None if case.window_size is None else (case.window_size - 1, 0)
    without = "" if case.num_sink_tokens == 0 and not case.sink_logits else ", no sinks"

    def attention(implementation):
        def run(q, k, v):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=window, implementation=implementation
            )

        return _with_gradient(case, run)

    has_room = 4 * case.num_heads * case.length**2 <= MOST_SCORES
    found = {
        f"jax.nn, {name}{without}": _bound(attention(name), q, k, v, *dout)
        for name in ("cudnn", "xla")
        if has_room or name == "cudnn"
    }
    if case.kernel == "forward" and window is None and case.value_dim is None:
        if capability >= 90 and q.dtype == jnp.bfloat16 and q.shape[-1] <= 128:
            found["jax attention_mgpu, float16"] = _bound(_attention_mgpu, q, k, v)
        found["jax mha, k and v repeated"] = _bound(_mha, q, k, v)
    tokamax = _tokamax()
    if tokamax is not None:

        def theirs(q, k, v):
            return tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)

        found[f"tokamax{without}"] = _bound(_with_gradient(case, theirs), q, k, v, *dout)
    return found


def _with_gradient(case: window_cases.CompiledCase, attend: Callable) -> Callable[..., Any]:
    """What the case asks for, its gradient or the result, of an attention of q, k and v."""

    def function(q, k, v, dout=None):
        if dout is None:
            return attend(q, k, v)
        if case.kernel == "gradient_q":
            return jax.vjp(lambda q: attend(q, k, v), q)[1](dout)
        assert case.kernel == "gradient_kv"
        return jax.vjp(lambda k, v: attend(q, k, v), k, v)[1](dout)

    return function


def _attention_mgpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """In float16, which its buffers are of, whatever the operands (jax 0.10.2)."""
    module = _pallas("attention_mgpu")
    q, k, v = (x.astype(jnp.float16) for x in (q * q.shape[-1] ** -0.5, k, v))
    tuning = module.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=3, causal=True)
    return module.attention(q, k, v, tuning)


def _mha(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return _pallas("attention").mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=True)


# --- Pages ---------------------------------------------------------------------------------------


def _of_paged(case: paged_cases.CompiledCase, operands: Operands) -> dict[str, Peer]:
    found: dict[str, Peer] = {"xla, pages gathered": _bound(_paged_xla(case), *operands)}
    if case.window_size is not None:
        return found
    q, k, v, tables, lengths, k_scales, v_scales = operands
    q = q * q.shape[-1] ** -0.5  # the first of these has no scale of its own

    def of_heads(x):  # [P, S, G, ...] to [G, P, S, ...]
        return None if x is None else jnp.moveaxis(x, 2, 0)

    theirs = lambda *a: _pallas("paged_attention").paged_attention(*a)  # noqa: E731
    pages = (of_heads(k), of_heads(v), tables, lengths, of_heads(k_scales), of_heads(v_scales))
    found["jax paged_attention"] = _bound(theirs, q, *pages)
    if case.pages == "bfloat16":

        def contiguous(q, k_BLGC, v_BLGC, lengths):
            decode = _pallas("decode_attention")
            return decode.gqa(q, k_BLGC, v_BLGC, kv_seq_len=lengths, sm_scale=1.0)

        shape = (case.batch, -1, *k.shape[2:])
        k_BLGC, v_BLGC = (x[tables].reshape(shape) for x in (k, v))
        found["jax gqa, no pages"] = _bound(contiguous, q, k_BLGC, v_BLGC, lengths)
    return found


def _paged_xla(case: paged_cases.CompiledCase) -> Callable[..., Any]:
    reach = {
        "window_size": case.window_size,
        "num_sink_tokens": case.num_sink_tokens,
        "sink_logits_H": None,
    }

    def function(*operands):
        *operands, k_scales, v_scales = operands
        scales = {"k_scales_PSG": k_scales, "v_scales_PSG": v_scales}
        return paged_reference.paged_attention(*operands, **scales, **reach)

    return function


def _latent_xla(case: paged_cases.CompiledLatentCase) -> Callable[..., Any]:
    reach = {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}
    scale = (case.nope_head_dim + case.rope_head_dim) ** -0.5

    def function(*operands):
        *operands, scales = operands
        settings = {"latent_scales_ZS": scales, "scale": scale, **reach}
        return paged_reference.paged_latent_attention(*operands, **settings)

    return function
