"""Gated delta nets, three to one with attention, against windows and attention: quality at equal
parameters and steps, speed by length, and the kernel's own error and cost.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import (
    VOCAB,
    corpus_batches,
    evaluate_held_out,
    held_out_rows,
    paired,
    ratio,
    small_run,
    standard_library,
    train,
)
from benchmarks.flops import count_flops
from configs.architecture import ModelConfig
from configs.models import delta_nano, v31_nano
from data.held_out import token_bytes
from kernels.delta_rule import delta_rule
from model.transformer import Transformer, hidden_states, init_variables
from train.report import BLUE, ORANGE, Picture, new_figure, to_picture

STEPS, SEQ_LEN, BATCH_SIZE = 250, 256, 16
HELD_OUT_TOKENS = 65_536
LENGTHS = (1024, 4096, 16_384)
KERNEL_LENGTHS = (1024, 2048, 4096, 8192, 16_384)
CHECKED = 2048
"""Tokens over which chunks are compared with the recurrence."""
ROUNDS = 5
HEADS, KEYS, VALUES = 4, 64, 64
DELTA, WINDOWS = "delta nets", "windows"
MODELS: dict[str, Callable[[], ModelConfig]] = {DELTA: delta_nano, WINDOWS: v31_nano}
COLORS = {DELTA: BLUE, WINDOWS: ORANGE}


def run(seeds: int) -> Report:
    bits, seconds = _trained(seeds)
    rates = {length: _reading_rates(length) for length in LENGTHS}
    times = _kernel_seconds()
    findings = [
        *(
            Finding(name=f"{kind}: held-out bits per byte", values=tuple(values))
            for kind, values in bits.items()
        ),
        paired(
            "bits per byte, delta nets less windows",
            bits[DELTA],
            bits[WINDOWS],
            Target(limit=0.0, stretch=-0.02, at_most=True),
        ),
        ratio("seconds of a step, delta nets over windows", seconds[DELTA], seconds[WINDOWS], None),
        *(
            Finding(name=f"{kind}: tokens/s read at {length:,}", values=tuple(by_kind[kind]))
            for length, by_kind in rates.items()
            for kind in MODELS
        ),
        _fit("kernel's FLOPs", [_kernel_flops(n) for n in KERNEL_LENGTHS]),
        _fit("kernel's time", times),
        Finding(
            name=f"chunks beside the recurrence over {CHECKED:,} tokens, of the largest value",
            values=(_kernel_error(),),
            target=Target(limit=1e-5, at_most=True),
        ),
    ]
    sizes = {kind: make().num_parameters for kind, make in MODELS.items()}
    return Report(
        title="delta_net: gated delta nets, three to one with attention, against windows",
        article="linear attention in three of four layers is as good, and its cost per token stays "
        "as the text grows (Qwen3-Next, Kimi Linear, 2025)",
        bound="the one attention over everything in four layers still grows with the text: half as "
        "many of them as in v31_nano",
        setting=f"delta_nano ({sizes[DELTA]:,} parameters) and v31_nano ({sizes[WINDOWS]:,}), "
        f"{STEPS} steps of {BATCH_SIZE} x {SEQ_LEN} tokens of the standard library, same data; "
        f"{HELD_OUT_TOKENS:,} held-out tokens; reading: one row, drawn weights, both in turn for "
        f"{ROUNDS} rounds; the kernel by itself with {HEADS} heads of {KEYS} x {VALUES}",
        findings=findings,
        picture=_draw(rates),
        notes=["Exponents are those of a line through the logarithms: 1 is linear in the length."],
    )


def _trained(seeds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Held-out bits per byte and seconds of a step, of each kind by seed."""
    rows = held_out_rows(HELD_OUT_TOKENS, SEQ_LEN)
    bytes_V = token_bytes(standard_library().tokenizer(), VOCAB)
    assert bytes_V is not None
    bits_per_nat = rows["targets"].size / (math.log(2) * bytes_V[rows["targets"]].sum())
    bits: dict[str, list[float]] = {kind: [] for kind in MODELS}
    seconds: dict[str, list[float]] = {kind: [] for kind in MODELS}
    for seed in range(seeds):
        for kind, make in MODELS.items():
            sizes = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE}
            config = small_run(make(), steps=STEPS, seed=seed, **sizes)
            trained = train(config, corpus_batches(config), f"{kind}, seed {seed}")
            judged = evaluate_held_out(trained.model, trained.variables, rows)
            bits[kind].append(judged.nats * bits_per_nat)
            seconds[kind].append(trained.seconds)
    return bits, seconds


def _reading_rates(length: int) -> dict[str, list[float]]:
    """Tokens per second of a pass over one row, of each kind by round."""
    tokens = np.random.RandomState(0).randint(0, VOCAB, (1, length)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    programs = {}
    for kind, make in MODELS.items():
        model = Transformer(dataclasses.replace(make(), context_length=length))
        read = jax.jit(lambda v, t, p, model=model: hidden_states(model, v, t, p)[0])
        programs[kind] = (read, jax.jit(functools.partial(init_variables, model, 0))())
    found: dict[str, list[float]] = {kind: [] for kind in MODELS}
    for turn in range(ROUNDS + 1):
        for kind, (read, variables) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(read(variables, tokens, positions))
            if turn:  # the first one compiles
                found[kind].append(length / (time.perf_counter() - began))
    return found


def kernel_arguments(length: int) -> tuple[jax.Array, ...]:
    """One row of drawn queries, keys and values, decays and corrections as layers make them."""
    random = np.random.RandomState(0)
    q, k = (random.standard_normal((1, length, HEADS, KEYS)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = random.standard_normal((1, length, HEADS, VALUES))
    log_decay = -random.uniform(1e-3, 0.1, (1, length, HEADS, 1))
    beta = random.uniform(0, 1, (1, length, HEADS))
    floats = (jnp.asarray(x, jnp.float32) for x in (q / KEYS, k, v, log_decay, beta))
    state = jnp.zeros((1, HEADS, KEYS, VALUES), jnp.float32)
    return (*floats, jnp.arange(length, dtype=jnp.int32)[None], state)


def _kernel_flops(length: int) -> float:
    return count_flops(delta_rule, *jax.eval_shape(lambda: kernel_arguments(length)))


def _kernel_seconds() -> list[float]:
    """The least of the rounds, by length."""
    program: Any = jax.jit(delta_rule)
    least = []
    for length in KERNEL_LENGTHS:
        arguments = kernel_arguments(length)
        jax.block_until_ready(program(*arguments))
        rounds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            rounds.append(time.perf_counter() - began)
        least.append(min(rounds))
    return least


def _kernel_error() -> float:
    """The largest difference of results and states, of the largest value."""
    arguments, worst = kernel_arguments(CHECKED), 0.0
    ways = (
        jax.jit(functools.partial(delta_rule, implementation=way)) for way in ("xla", "reference")
    )
    for found, expected in zip(*(way(*arguments) for way in ways), strict=True):
        worst = max(worst, float(jnp.abs(found - expected).max() / jnp.abs(expected).max()))
    return worst


def _fit(what: str, values: list[float]) -> Finding:
    exponent = float(np.polyfit(np.log(KERNEL_LENGTHS), np.log(values), 1)[0])
    first, last = KERNEL_LENGTHS[0], KERNEL_LENGTHS[-1]
    return Finding(
        name=f"{what}: fitted exponent, {first:,} to {last:,} tokens",
        values=(exponent,),
        target=Target(limit=1.1, stretch=1.02, at_most=True),
    )


def _draw(rates: dict[int, dict[str, list[float]]]) -> Picture:
    figure, axes = new_figure(6.5, 3.6)
    for kind, color in COLORS.items():
        medians = [float(np.median(by_kind[kind])) for by_kind in rates.values()]
        axes.plot(list(rates), medians, "o-", color=color, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rates), [f"{n:,}" for n in rates])
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("tokens/s read")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return to_picture(figure, "delta_net", "Reading speed by length.")
