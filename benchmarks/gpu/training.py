"""A training step of a MoE of OLMoE's layer shape on the device: tokens/s, MFU, memory, loss."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.gpu import kernel_times
from benchmarks.gpu.peer_process import run_peer
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.base import DataConfig, ExecutionConfig, RunConfig
from configs.feed_forward import MoEConfig, RouterConfig
from configs.optimizer import OptimizerConfig
from model.flops import training_flops_per_token
from model.router import route
from parallel.mesh import make_mesh
from train.state import init_state, make_train_setup
from train.step import make_train_step

STEPS = 4
"""Timed, after two that are not."""
LAYERS, ROWS, LENGTH = 4, 4, 4096
LONGEST_KERNELS = 40


def olmoe_run(num_layers: int = LAYERS, rows: int = ROWS, length: int = LENGTH) -> RunConfig:
    """A run of OLMoE-1B-7B's layers (2409.02060, 2024), fewer of them, in bfloat16."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="all")
    router = RouterConfig(top_k=8, normalize_gates=False)
    ffn = MoEConfig(num_experts=64, d_ff=1024, router=router)
    model = ModelConfig(
        vocab_size=50_304,
        d_model=2048,
        num_layers=num_layers,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=length,
        norm_eps=1e-5,
    )
    return RunConfig(
        name="olmoe_step",
        steps=1_000_000,
        batch_size=rows,
        model=model,
        data=DataConfig(seq_len=length),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=0),
        execution=ExecutionConfig(compute_dtype="bfloat16", logits_chunks=8),
    )


def draw_batch(run: RunConfig) -> dict[str, jax.Array]:
    """Random tokens with a long tail, as text has it."""
    shape = (run.batch_size, run.data.seq_len + 1)
    uniform = jax.random.uniform(jax.random.key(1), shape, minval=1e-6)
    tokens_BL = (run.model.vocab_size * uniform**3).astype(jnp.int32)
    row_L = jnp.arange(run.data.seq_len, dtype=jnp.int32)
    positions_BL = jnp.broadcast_to(row_L, tokens_BL[:, 1:].shape)
    return {
        "tokens": tokens_BL[:, :-1],
        "targets": tokens_BL[:, 1:],
        "positions": positions_BL,
    }


@contextlib.contextmanager
def balanced_routing() -> Iterator[None]:
    """Deals the experts out in turn, whatever the scores: token t has those from t K on."""

    def dealt(router_logits_TE: jax.Array, config: RouterConfig, *rest: Any, **options: Any):
        num_tokens, num_experts = router_logits_TE.shape
        first_T = jnp.arange(num_tokens) * config.top_k
        distance_TE = (jnp.arange(num_experts)[None] - first_T[:, None]) % num_experts
        logits_TE = jnp.where(distance_TE < config.top_k, router_logits_TE, -1e9)
        return route(logits_TE, config, *rest, **options)

    with mock.patch("model.moe.route", dealt):
        yield


def measure(run: RunConfig, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """Seconds and losses of steps on one batch, and where a last one's time went.

    Args:
      folder: where that step's profile is written; None takes none.
    """
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        batch = draw_batch(run)
        began = time.monotonic()
        lowered: Any = make_train_step(run, setup)
        step = lowered.lower(setup.abstract_state, batch).compile()
        compile_seconds = time.monotonic() - began
        state, metrics = init_state(setup, run.seed), {}
        seconds, losses = [], []
        for _ in range(2 + steps):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
        memory = jax.devices()[0].memory_stats() or {}
        longest = [] if folder is None else _profiled(step, state, batch, folder / "trace")
    median = statistics.median(seconds[2:])
    flops = run.tokens_per_step * training_flops_per_token(run.model, run.data.seq_len)
    load_cv = [float(x) for layer in metrics["router"].values() for x in layer["load_cv"]]
    return {
        "layers": run.model.num_layers,
        "tokens": run.tokens_per_step,
        "seconds": seconds,
        "losses": losses,
        "tokens_per_second": run.tokens_per_step / median,
        "flops": flops,
        "flops_per_second": flops / median,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "load_cv": load_cv,
        "compile_seconds": compile_seconds,
        "kernels": longest,
    }


def _profiled(step: Any, state: Any, batch: Any, folder: Path) -> list[Any]:
    """Kernels of one step, how often each ran and its microseconds, the longest first."""
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(step(state, batch))
    return kernel_times.kernel_times(folder)[:LONGEST_KERNELS]


def measure_peer(run: RunConfig, steps: int, seconds: float) -> dict[str, Any]:
    """The same of transformers' OLMoE, compiled by torch (transformers_peer.py)."""
    layer = run.model.pattern[0]
    attention, ffn = layer.attention, layer.ffn
    assert isinstance(attention, AttentionConfig)
    assert isinstance(ffn, MoEConfig)
    settings = {
        "task": "train",
        "layers": run.model.num_layers,
        "d_model": run.model.d_model,
        "d_ff": ffn.d_ff,
        "heads": attention.num_heads,
        "experts": ffn.num_experts,
        "top_k": ffn.router.top_k,
        "vocab_size": run.model.vocab_size,
        "rows": run.batch_size,
        "length": run.data.seq_len,
        "steps": steps,
        "is_compiled": True,
    }
    return run_peer(settings, seconds)


def shrunk(run: RunConfig) -> RunConfig:
    """The same run in widths for a CPU."""
    layer = run.model.pattern[0]
    attention = dataclasses.replace(layer.attention, num_heads=2, num_kv_heads=2, head_dim=16)
    ffn = dataclasses.replace(layer.ffn, d_ff=32)
    pattern = (dataclasses.replace(layer, attention=attention, ffn=ffn),)
    model = dataclasses.replace(run.model, d_model=64, vocab_size=512, pattern=pattern)
    return dataclasses.replace(run, model=model)
