"""Decoding with OLMoE's shape by the model itself: its step, and the engine that serves.

Each step reads a token of every sequence, whose keys and values lie in pages, and says the next.
Many steps are one program, which shows what the device does; the engine calls a program for each
step, reads the prompts before, and chooses tokens as it does for every request.

B sequences, N pages of a sequence, K experts per token.
"""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.peer_process import run_peer
from benchmarks.gpu.training import olmoe_run
from configs.attention import AttentionConfig
from configs.feed_forward import MoEConfig
from infer import steps
from infer.engine.engine import Engine
from infer.engine.options import EngineOptions
from infer.engine.types import Request
from infer.load import inference_model
from infer.weights import WeightFormat, formats_of, matrices_of
from kernels.backend import Target, current_target
from kernels.quantize import MatrixDims
from kernels.quantize.formats import to_format
from model.model_state import ModelState, init_state
from model.transformer import Transformer, Variables, abstract_variables
from model.unstacked import unstacked_config

LAYERS, CONTEXT = 16, 1024
"""Of OLMoE-1B-7B (2409.02060, 2024), and tokens of each sequence when the first step begins."""
PAGE_SIZE = 64
STEPS, ROUNDS = 32, 3
BATCHES = (1, 32, 256)
WANTED: tuple[tuple[WeightFormat, int], ...] = (
    *[("bfloat16", batch) for batch in (32, 1, 256)],
    *[("int8", batch) for batch in (32, 1)],
    ("int4", 1),
    ("fp8", 32),
    ("int4", 32),
    ("int8", 256),
)
"""Formats and batches, the most wanted first."""
BY_ENGINE: tuple[tuple[WeightFormat, int], ...] = (("bfloat16", 32), ("int8", 32))
OURS = 0.68
"""Of the time for both."""
COMPILED_AHEAD = 3
"""Programs that are compiled at once: more would all be late, and each tunes its products on the
device."""
STDDEV = 0.02
"""Of the weights that are drawn."""


def olmoe_model(num_layers: int = LAYERS, length: int = 2 * CONTEXT) -> Transformer:
    """OLMoE's layers, each with weights of its own: out of a stack XLA would copy what it reads."""
    model = inference_model(olmoe_run(num_layers, length=length))
    return Transformer(unstacked_config(model.config), model.execution)


# --- What is drawn -------------------------------------------------------------------------------


def draw_variables(model: Transformer, weights: WeightFormat, seed: int = 0) -> Variables:
    """Random weights in their formats; made on the device, one after the other."""
    target, formats, matrices = current_target(), formats_of(model, weights), matrices_of(model)
    abstract, _ = abstract_variables(model)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(abstract))))

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> Any:
        name, key = jax.tree_util.keystr(path[1:]), next(keys)
        if "norm" in name:
            return jnp.ones(x.shape, x.dtype)
        dims = matrices[name][1] if name in formats else None
        return _draw_weight(x.shape, formats.get(name, "float32"), dims, target, key)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw_weight(
    shape: tuple[int, ...],
    format: WeightFormat,
    dims: MatrixDims | None,
    target: Target,
    key: jax.Array,
) -> Any:
    x = STDDEV * jax.random.normal(key, shape, jnp.float32)
    return x if dims is None else to_format(x, format, target, dims=dims)


def draw_state(model: Transformer, batch: int, num_pages: int) -> ModelState:
    """Pages that hold random keys and values; each is drawn by one small program for all of them,
    as one program that draws all takes half a minute to compile."""
    sizes = {"num_pages": 1 + batch * num_pages, "page_size": PAGE_SIZE}
    state = jax.eval_shape(
        lambda: init_state(model.config, batch, num_pages * PAGE_SIZE, "bfloat16", **sizes)
    )
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    return jax.tree.map(lambda x: _draw_pages(x.shape, x.dtype, next(keys)), state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_pages(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def pages_of(batch: int, num_pages: int) -> np.ndarray:
    """The pages of each sequence, int32 [B, N]; page 0 is nobody's."""
    return 1 + np.arange(batch * num_pages, dtype=np.int32).reshape(batch, num_pages)


# --- The model's step ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def decode(
    model: Transformer,
    num_steps: int,
    variables: Variables,
    token_B: jax.Array,
    position_B: jax.Array,
    state: ModelState,
    tables_BN: jax.Array,
) -> tuple[jax.Array, ModelState, Any]:
    """The last tokens, the state, and the experts of each step, int32 [steps, 1, B, 1, K] by MoE
    layer."""

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        token_B, position_B, state = carry
        logits_BV, state, chosen = steps.decode(
            model, variables, token_B, position_B, state, tables_BN, None, True
        )
        return (steps.best_of(logits_BV), position_B + 1, state), chosen

    (token_B, _, state), chosen = lax.scan(
        step, (token_B, position_B, state), None, length=num_steps
    )
    return token_B, state, chosen


def num_pages_for(context: int, num_steps: int) -> int:
    return -(-(context + num_steps) // PAGE_SIZE)


def compile_decode(
    model: Transformer, weights: WeightFormat, batch: int, context: int, num_steps: int
) -> tuple[Any, float]:
    """The program of so many steps, made without its arrays, and the seconds that took."""
    num_pages = num_pages_for(context, num_steps)
    variables = jax.eval_shape(lambda: draw_variables(model, weights))
    state = jax.eval_shape(lambda: draw_state(model, batch, num_pages))
    row_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tables_BN = jax.ShapeDtypeStruct((batch, num_pages), jnp.int32)
    began = time.perf_counter()
    lowered = decode.lower(model, num_steps, variables, row_B, row_B, state, tables_BN)
    return lowered.compile(), time.perf_counter() - began


def measure_all(
    model: Transformer,
    wanted: Sequence[tuple[WeightFormat, int]] = WANTED,
    context: int = CONTEXT,
    num_steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
    """Yields the figures of each format and batch; others' programs are compiled meanwhile."""
    with ThreadPoolExecutor(COMPILED_AHEAD) as pool:
        programs = [
            pool.submit(compile_decode, model, *each, context, num_steps) for each in wanted
        ]
        held: tuple[WeightFormat, Variables] | None = None
        for (weights, batch), program in zip(wanted, programs, strict=True):
            if held is None or held[0] != weights:
                held = None  # room for the next
                held = weights, draw_variables(model, weights)
            compiled, seconds = program.result()
            found = measure(model, held[1], batch, compiled, context, num_steps)
            yield {"weights": weights, "compile_seconds": seconds} | found


def measure(
    model: Transformer,
    variables: Variables,
    batch: int,
    compiled: Any,
    context: int,
    num_steps: int,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Tokens/s of the compiled steps, and the bytes that one reads at least."""
    num_pages = num_pages_for(context, num_steps)
    state = draw_state(model, batch, num_pages)
    token_B = jnp.arange(batch, dtype=jnp.int32) * 97 % model.config.vocab_size
    position_B, tables_BN = (
        jnp.full(batch, context, jnp.int32),
        jnp.array(pages_of(batch, num_pages)),
    )
    seconds, chosen = [], {}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        last_B, state, chosen = compiled(variables, token_B, position_B, state, tables_BN)
        jax.block_until_ready(last_B)
        seconds.append((time.perf_counter() - began) / num_steps)
    median = statistics.median(seconds[1:])
    used = experts_used(chosen)
    moved = least_bytes(model, variables, batch, context, used)
    return {
        "batch": batch,
        "layers": model.config.num_layers,
        "context": context,
        "tokens_per_second": batch / median,
        "seconds_per_step": seconds[1:],
        "experts_used": used,
        "least_bytes": moved,
        "gigabytes_per_second": moved / median / 1e9,
    }


def experts_used(chosen: Any) -> float:
    """Of a layer in a step, on average."""
    counts = [
        len(np.unique(of_step[of_step >= 0]))
        for layer in jax.tree.leaves(chosen)
        for of_step in np.asarray(layer)
    ]
    return float(np.mean(counts))


def least_bytes(
    model: Transformer, variables: Variables, batch: int, context: int, experts_used: float
) -> float:
    """The least bytes of a step: each matrix that is used once, in its format, and the keys and
    values seen.

    Args:
      experts_used: of a layer, on average.
    """
    spec = model.config.pattern[0]
    assert isinstance(spec.attention, AttentionConfig)
    assert isinstance(spec.ffn, MoEConfig)
    total = 0.0
    for path, x in jax.tree.leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path)
        if "embedding" in name:
            total += x.nbytes * batch / model.config.vocab_size
        elif "'gate_up'" in name or "'down'" in name:
            total += x.nbytes * experts_used / spec.ffn.num_experts
        else:
            total += x.nbytes
    of_position = 2 * 2 * spec.attention.num_kv_heads * spec.attention.head_dim
    return total + of_position * batch * context * model.config.num_layers


# --- The engine ----------------------------------------------------------------------------------


def measure_engine(
    model: Transformer,
    weights: WeightFormat,
    batch: int,
    context: int = CONTEXT,
    num_steps: int = STEPS,
) -> dict[str, Any]:
    """Tokens/s of as many requests as the engine has rows: of reading their prompts, all in its
    first step, and of the steps after, whose calls and choices are the host's. The second of two
    rounds.
    """
    new_tokens = num_steps + 2  # the first step gives two
    options = EngineOptions(
        max_rows=batch,
        max_length=context + new_tokens,
        num_pages=1 + 3 * batch * num_pages_for(context, new_tokens) // 2,
        page_size=PAGE_SIZE,
        piece=batch * context,
    )
    engine = Engine(model, draw_variables(model, weights), options)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context))
    seconds: list[float] = []
    for _ in range(2):
        for prompt in prompts.tolist():
            engine.add(Request(prompt=prompt, max_new_tokens=new_tokens))
        seconds = []
        while engine.has_work():
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
    reading, *decoding = seconds
    median = statistics.median(decoding)
    return {
        "weights": weights,
        "batch": batch,
        "layers": model.config.num_layers,
        "context": context,
        "tokens_per_second": batch / median,
        "seconds_per_step": decoding,
        "prompt_tokens_per_second": batch * context / reading,
    }


def measure_peer(model: Transformer, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """The same of transformers' OLMoE in bfloat16 (transformers_peer.py)."""
    config = model.config
    attention, ffn = config.pattern[0].attention, config.pattern[0].ffn
    assert isinstance(attention, AttentionConfig)
    assert isinstance(ffn, MoEConfig)
    settings = {
        "task": "decode",
        "layers": config.num_layers,
        "d_model": config.d_model,
        "d_ff": ffn.d_ff,
        "heads": attention.num_heads,
        "experts": ffn.num_experts,
        "top_k": ffn.router.top_k,
        "vocab_size": config.vocab_size,
        "context": CONTEXT,
        "length": config.context_length,
        "batches": list(batches),
        "steps": STEPS,
    }
    return run_peer(settings, seconds)
