"""Decoding with OLMoE's shape, a step made of the kernels: paged attention, grouped products of
weights in any format. What the model's own decoding can reach once it takes them.

Each step reads a token of every sequence, writes its keys and values into pages, attends, sends it
through its experts and chooses the next one; many steps are one program on the device.

B sequences, D d_model, H heads, C head_dim, E experts, K experts per token, F d_ff, V vocab,
P pages of S positions, N pages of a sequence. Layers have arrays of their own: out of a stack XLA
would copy what a kernel reads.
"""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu.peer_process import run_peer
from kernels.backend import current_target
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.matmul import matmul
from kernels.paged_attention import paged_attention
from kernels.quantize import preferred_packing, quantize, repack
from model.layers import rope
from parallel.expert import apply_experts

PAGE_SIZE = 64
STEPS, ROUNDS = 32, 3
BATCHES = (1, 32, 256)
WANTED = (
    *[("bf16", batch) for batch in BATCHES],
    *[("int8", batch) for batch in BATCHES],
    ("fp8_e4m3", 32),
    ("int4", 1),
    ("int4", 32),
)
"""Formats and batches, the most wanted first."""
OURS = 0.6
"""Of the time for both."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's widths; OLMoE-1B-7B's (2409.02060, 2024)."""

    num_layers: int = 16
    d_model: int = 2048
    num_heads: int = 16
    head_dim: int = 128
    num_experts: int = 64
    top_k: int = 8
    d_ff: int = 1024
    vocab_size: int = 50_304
    context: int = 1024
    """Tokens of each sequence when the first step begins."""


class Layer(NamedTuple):
    """One layer's weights: arrays, or QTensors."""

    qkv: Any
    out: Any
    router_DE: jax.Array
    gate_up: Any
    down: Any


class Pages(NamedTuple):
    """Keys and values of all layers, and where those of each sequence lie."""

    k_PSHC: tuple[jax.Array, ...]
    v_PSHC: tuple[jax.Array, ...]
    tables_BN: jax.Array
    lengths_B: jax.Array


class Decoder(NamedTuple):
    embedding_VD: jax.Array
    layers: tuple[Layer, ...]
    output: Any


def draw_decoder(shape: Shape, weights: str, seed: int = 0) -> Decoder:
    """Random weights, the matrices in a format; made on the device, a layer after the other."""
    width, heads = shape.d_model, shape.num_heads * shape.head_dim

    def matrix(key: jax.Array, *dims: int) -> Any:
        w = jax.random.normal(key, dims, jnp.float32) * dims[-2] ** -0.5
        if weights == "bf16":
            return w.astype(jnp.bfloat16)
        made = quantize(w, weights)  # type: ignore[arg-type]
        return repack(made, preferred_packing(made.format, current_target()))

    @jax.jit
    def layer(key: jax.Array) -> Layer:
        keys = jax.random.split(key, 5)
        return Layer(
            qkv=matrix(keys[0], width, 3 * heads),
            out=matrix(keys[1], heads, width),
            router_DE=jax.random.normal(keys[2], (width, shape.num_experts)) * width**-0.5,
            gate_up=matrix(keys[3], shape.num_experts, width, 2 * shape.d_ff),
            down=matrix(keys[4], shape.num_experts, shape.d_ff, width),
        )

    first, last, *keys = jax.random.split(jax.random.key(seed), 2 + shape.num_layers)
    embedding_VD = jax.random.normal(first, (shape.vocab_size, width), jnp.bfloat16)
    output = jax.jit(lambda key: matrix(key, width, shape.vocab_size))(last)
    return Decoder(embedding_VD, tuple(map(layer, keys)), output)


def draw_pages(shape: Shape, batch: int, steps: int) -> Pages:
    """Pages that hold each sequence's context and have room for so many steps more."""
    per_sequence = -(-(shape.context + steps) // PAGE_SIZE)
    pages = (batch * per_sequence, PAGE_SIZE, shape.num_heads, shape.head_dim)
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), pages, jnp.bfloat16))

    def pool(seed: int) -> tuple[jax.Array, ...]:
        return tuple(draw(2 * i + seed) for i in range(shape.num_layers))

    tables_BN = jnp.arange(batch * per_sequence, dtype=jnp.int32).reshape(batch, per_sequence)
    return Pages(pool(0), pool(1), tables_BN, jnp.full((batch,), shape.context, jnp.int32))


def norm(x_BD: jax.Array) -> jax.Array:
    x32_BD = x_BD.astype(jnp.float32)
    scale_B1 = lax.rsqrt(jnp.mean(x32_BD * x32_BD, axis=-1, keepdims=True) + 1e-5)
    return (x32_BD * scale_B1).astype(x_BD.dtype)


def experts(x_RD: jax.Array, sizes_E: jax.Array, weights: dict[str, Any]) -> jax.Array:
    h_RF = grouped_swiglu(x_RD, weights["gate_up"], sizes_E)
    return grouped_matmul(h_RF, weights["down"], sizes_E)


@functools.partial(jax.jit, static_argnums=0)
def run_layer(
    shape: Shape,
    x_BD: jax.Array,
    layer: Layer,
    k_PSHC: jax.Array,
    v_PSHC: jax.Array,
    tables_BN: jax.Array,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns x after the layer, the layer's pages with the token, and the experts it used.

    All layers share its trace: sixteen by themselves take ten seconds to lower.
    """
    batch, heads = x_BD.shape[0], (shape.num_heads, shape.head_dim)
    qkv_B3HC = matmul(norm(x_BD), layer.qkv).reshape(batch, 3, *heads)
    q_BHC, k_BHC = (
        rope(norm(qkv_B3HC[:, i])[:, None], position_B[:, None], 1e4)[:, 0] for i in range(2)
    )
    rows_B = jnp.arange(batch)
    at = (tables_BN[rows_B, position_B // PAGE_SIZE], position_B % PAGE_SIZE)
    k_PSHC, v_PSHC = k_PSHC.at[at].set(k_BHC), v_PSHC.at[at].set(qkv_B3HC[:, 2])
    out_BHC = paged_attention(q_BHC, k_PSHC, v_PSHC, tables_BN, position_B + 1)
    x_BD += matmul(out_BHC.reshape(batch, -1), layer.out)
    h_BD = norm(x_BD)
    scores_BE = jax.nn.softmax(h_BD.astype(jnp.float32) @ layer.router_DE)
    gates_BK, ids_BK = lax.top_k(scores_BE, shape.top_k)
    update_BD, stats = apply_experts(
        h_BD,
        ids_BK.astype(jnp.int32),
        gates_BK,
        {"gate_up": layer.gate_up, "down": layer.down},
        grouped_fn=experts,
        num_experts=shape.num_experts,
        weight_axes={},
    )
    return x_BD + update_BD, k_PSHC, v_PSHC, (stats.load_E > 0).sum()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def decode(
    shape: Shape, steps: int, decoder: Decoder, token_B: jax.Array, pages: Pages
) -> tuple[jax.Array, Pages, jax.Array]:
    """Returns the last tokens, the pages, and the experts used in all steps and layers."""

    def step(_, carry):
        token_B, pages, used = carry
        x_BD, k_PSHC, v_PSHC = decoder.embedding_VD[token_B], [], []
        for layer, k, v in zip(decoder.layers, pages.k_PSHC, pages.v_PSHC, strict=True):
            where = (pages.tables_BN, pages.lengths_B)
            x_BD, k, v, count = run_layer(shape, x_BD, layer, k, v, *where)
            k_PSHC.append(k)
            v_PSHC.append(v)
            used += count
        logits_BV = matmul(norm(x_BD), decoder.output)
        token_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
        lengths_B = pages.lengths_B + 1
        return token_B, Pages(tuple(k_PSHC), tuple(v_PSHC), pages.tables_BN, lengths_B), used

    return lax.fori_loop(0, steps, step, (token_B, pages, jnp.int32(0)))


def bytes_per_step(shape: Shape, weights: str, batch: int, experts_used: float) -> float:
    """The least bytes of a step: each matrix that is used once, and the keys and values seen.

    Args:
      experts_used: of a layer, on average.
    """
    bits = {"bf16": 16.0, "int8": 8.25, "fp8_e4m3": 8.25, "int4": 4.25}[weights]
    width, heads = shape.d_model, shape.num_heads * shape.head_dim
    per_layer = 4 * width * heads + experts_used * 3 * width * shape.d_ff
    matrices = shape.num_layers * per_layer + width * shape.vocab_size
    routers = 4 * shape.num_layers * width * shape.num_experts
    seen = 2 * 2 * heads * batch * shape.context * shape.num_layers
    return matrices * bits / 8 + routers + seen


def compile_decode(shape: Shape, weights: str, batch: int, steps: int) -> Any:
    """The program of so many steps, made without their arrays."""
    decoder = jax.eval_shape(lambda: draw_decoder(shape, weights))
    pages = jax.eval_shape(lambda: draw_pages(shape, batch, steps))
    token_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return decode.lower(shape, steps, decoder, token_B, pages).compile()


def measure_all(
    shape: Shape, wanted: Sequence[tuple[str, int]] = WANTED, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """Yields the figures of each format and batch; their programs are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        programs = [pool.submit(compile_decode, shape, *each, steps) for each in wanted]
        for (weights, batch), program in zip(wanted, programs, strict=True):
            yield measure(shape, weights, batch, program.result(), steps)


def measure(
    shape: Shape, weights: str, batch: int, compiled: Any, steps: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Tokens/s of decoding by the compiled program, and the bytes that a step reads at least."""
    decoder = draw_decoder(shape, weights)
    pages = draw_pages(shape, batch, steps)
    token_B = jnp.arange(batch, dtype=jnp.int32) * 97 % shape.vocab_size
    seconds, used, lengths_B = [], 0, pages.lengths_B
    for _ in range(rounds + 1):
        pages = pages._replace(lengths_B=jnp.array(lengths_B))
        began = time.perf_counter()
        last_B, pages, used = compiled(decoder, token_B, pages)
        jax.block_until_ready(last_B)
        seconds.append((time.perf_counter() - began) / steps)
    median = statistics.median(seconds[1:])
    experts_used = float(used) / (steps * shape.num_layers)
    moved = bytes_per_step(shape, weights, batch, experts_used)
    return {
        "weights": weights,
        "batch": batch,
        "layers": shape.num_layers,
        "context": shape.context,
        "tokens_per_second": batch / median,
        "seconds_per_step": seconds[1:],
        "experts_used": experts_used,
        "least_bytes": moved,
        "gigabytes_per_second": moved / median / 1e9,
    }


def measure_peer(shape: Shape, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """The same of transformers' OLMoE in bfloat16 (transformers_peer.py)."""
    settings = {
        "task": "decode",
        "layers": shape.num_layers,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "heads": shape.num_heads,
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "vocab_size": shape.vocab_size,
        "context": shape.context,
        "length": 2 * shape.context,
        "batches": list(batches),
        "steps": STEPS,
    }
    return run_peer(settings, seconds)
