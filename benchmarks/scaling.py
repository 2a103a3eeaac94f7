"""The series of scripts/bench_scaling.py: models that differ in one thing, predicted, measured.

Predicted: cost per token linear in counted FLOPs for layers, flat in experts at fixed top-k, and
linear in length, where attention adds its share for every visible key.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.training import make_step, mixtral_run, random_batch
from configs.base import DataConfig, RunConfig
from configs.feed_forward import MoEConfig
from model.flops import training_flops_per_token
from train.loop import mesh_of, to_devices
from train.state import make_train_setup
from train.step import make_train_step

Change = Callable[[RunConfig, int], RunConfig]

COMPILED_DEPTHS = (8, 61)
"""Layers whose compile times are compared: a small model's and DeepSeek-V3's."""


def _layers(run: RunConfig, layers: int) -> RunConfig:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=layers))


def _experts(run: RunConfig, experts: int) -> RunConfig:
    spec = run.model.pattern[0]
    assert isinstance(spec.ffn, MoEConfig)
    ffn = dataclasses.replace(spec.ffn, num_experts=experts, d_ff=256)
    pattern = (dataclasses.replace(spec, ffn=ffn),)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, pattern=pattern))


def _length(run: RunConfig, length: int) -> RunConfig:
    """The same number of tokens per step in fewer, longer rows."""
    return dataclasses.replace(
        run,
        batch_size=run.tokens_per_step // length,
        data=DataConfig(seq_len=length),
        model=dataclasses.replace(run.model, context_length=length),
    )


SERIES: dict[str, tuple[Change, tuple[int, ...]]] = {
    "layers": (_layers, (1, 2, 3, 4)),
    "scanned layers": (_layers, (5, 8, 12, 16)),
    "experts": (_experts, (4, 8, 16, 32, 64)),
    "length": (_length, (128, 256, 512, 1024, 2048)),
}


def flops_per_token(run: RunConfig) -> float:
    """FLOPs of forward and backward that the mathematics asks for; the optimiser is left out."""
    return training_flops_per_token(run.model, run.data.seq_len)


def print_series(name: str, rounds: int) -> None:
    """Measures a series in turn and prints cost, prediction and fit."""
    change, values = SERIES[name]
    runs = [change(mixtral_run(), value) for value in values]
    steps = [make_step(run) for run in runs]
    seconds = [[_timed(step) for step in steps] for _ in range(rounds + 1)][1:]
    cost = np.array([statistics.median(column) for column in zip(*seconds, strict=True)])
    cost *= 1e6 / np.array([run.tokens_per_step for run in runs])
    flops = np.array([flops_per_token(run) for run in runs]) / 1e6
    table = Table(name, "parameters", "MFLOP/token", "us/token", "GFLOP/s")
    for value, run, f, c in zip(values, runs, flops, cost, strict=True):
        size = f"{run.model.num_parameters / 1e6:.1f}M"
        table.add_row(str(value), size, f"{f:.1f}", f"{c:.1f}", f"{f / c * 1e3:.0f}")
    Console().print(table)
    print(_fit(name, np.array(values, float), flops, cost))


def _timed(step: Callable[[], None]) -> float:
    """Seconds of a step after one that warms caches and memory."""
    step()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _fit(name: str, values: np.ndarray, flops: np.ndarray, cost: np.ndarray) -> str:
    if name == "experts":
        exponent = np.polyfit(np.log(values), np.log(cost), 1)[0]
        return f"fit: cost ~ experts^{exponent:.2f} at fixed top-k (0 is flat, 1 proportional)"
    unit, x = ("length", values) if name == "length" else ("MFLOP/token", flops)
    slope, base = np.polyfit(x, cost, 1)
    rest = cost - (base + slope * x)
    explained = 1 - (rest**2).sum() / ((cost - cost.mean()) ** 2).sum()
    speed = "" if name == "length" else f" (the slope is {1e3 / slope:.0f} GFLOP/s)"
    return f"fit: us/token = {base:.1f} + {slope:.3g} * {unit}, R^2 = {explained:.3f}{speed}"


def compile_seconds(layers: int) -> float:
    """Seconds to trace, lower and compile the train step of a model this deep; nothing is run."""
    jax.clear_caches()
    run = _layers(mixtral_run(), layers)
    mesh = mesh_of(run)
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        step: Any = make_train_step(run, setup)
        batch = to_devices(random_batch(run), mesh)
        began = time.perf_counter()
        step.lower(setup.abstract_state, batch).compile()
        return time.perf_counter() - began


def print_compile_times() -> None:
    shallow, deep = (min(compile_seconds(layers) for _ in range(2)) for layers in COMPILED_DEPTHS)
    print(
        f"compile: {COMPILED_DEPTHS[0]} layers {shallow:.1f} s, {COMPILED_DEPTHS[1]} layers "
        f"{deep:.1f} s; ratio {deep / shallow:.2f}"
    )
