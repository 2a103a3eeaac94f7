"""Evaluation with Transformer-XL's memory against recomputing a window for every token."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import held_out_rows
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import RelativeAttentionConfig
from configs.feed_forward import DenseConfig
from model.model_state import init_memory
from model.transformer import Transformer, Variables, hidden_states, init_variables, output_weights
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture

MEMORY, SEGMENT = 512, 256
TEXT = 2048
RECOMPUTED_AT_ONCE, RECOMPUTED_TOKENS = 8, 16
CHECKED = 64
ROUNDS = 5


def model() -> ModelConfig:
    """Four layers of width 256, each of which sees 512 tokens back."""
    attention = RelativeAttentionConfig(num_heads=4, head_dim=64, memory_length=MEMORY)
    return ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=4,
        pattern=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=1024)),),
        context_length=TEXT,
    )


def run(seeds: int) -> Report:
    text = held_out_rows(TEXT, TEXT)["tokens"][0]
    ways: dict[str, Callable] = {
        "memory": _with_memory,
        "half windows": _half_windows,
        "sliding": _sliding,
    }
    errors, rates = [], {name: [] for name in ways}
    for seed in range(seeds):
        transformer = Transformer(model())
        variables = jax.jit(functools.partial(init_variables, transformer, seed))()
        errors.append(_largest_difference(transformer, variables, text))
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                tokens = way(transformer, variables, text)
                if turn:  # the first one compiles
                    rates[name].append(tokens / (time.perf_counter() - began))

    def over(name: str, target: Target | None) -> Finding:
        values = tuple(a / b for a, b in zip(rates["memory"], rates[name], strict=True))
        return Finding(name=f"tokens/s over {name}", values=values, target=target)

    return Report(
        title="recurrence: evaluation with memory against a sliding window",
        article="Transformer-XL with relative positions; V3 answers 4.3 times as many tokens per "
        "second as V1",
        bound=f"a window of {MEMORY} tokens is read again for every token, so {MEMORY} times the "
        "work outside attention",
        setting=f"four layers of width 256, memory {MEMORY}, segments of {SEGMENT} tokens, drawn "
        f"weights, one text of {TEXT:,} tokens of the standard library; windows "
        f"{RECOMPUTED_AT_ONCE} at a time; half windows: each window of {MEMORY} gives the loss of "
        "its second half; no cache of keys in either of the two",
        findings=[
            over("sliding", Target(limit=4.3, stretch=30)),
            over("half windows", None),
            Finding(
                name=f"largest difference of logits over {CHECKED} places",
                values=tuple(errors),
                target=Target(limit=1e-5, at_most=True),
            ),
        ],
        picture=_draw(rates),
        notes=[
            "Places within the memory of the text's start are compared, where both ways see "
            "everything before; further on, memory sees more: four layers reach 2,048 tokens back."
        ],
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, tokens_BL, positions_BL, memory=None):
    hidden_BLD, memory = hidden_states(model, variables, tokens_BL, positions_BL, memory)
    return hidden_BLD @ output_weights(model, variables), memory


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(model, variables, tokens_BL, positions_BL):
    """Of each row's last token, [B, V]; rows are padded on the right."""
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL)
    last_B11 = jnp.argmax(positions_BL, axis=1)[:, None, None]
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B11, axis=1)[:, 0]
    return hidden_BD @ output_weights(model, variables)


def _segments(model: Transformer, variables: Variables, text: np.ndarray) -> list[jax.Array]:
    """Logits of the text's segments, each [SEGMENT, V]."""
    memory, logits = init_memory(model.config, 1, "float32"), []
    for begin in range(0, len(text), SEGMENT):
        tokens = text[None, begin : begin + SEGMENT]
        positions = np.arange(begin, begin + tokens.shape[1], dtype=np.int32)[None]
        part, memory = _logits(model, variables, tokens, positions, memory)
        logits.append(part[0])
    return logits


def _with_memory(model: Transformer, variables: Variables, text: np.ndarray) -> int:
    jax.block_until_ready(_segments(model, variables, text))
    return len(text)


def _half_windows(model: Transformer, variables: Variables, text: np.ndarray) -> int:
    positions = np.arange(MEMORY, dtype=np.int32)[None]
    for begin in range(0, len(text) - MEMORY + 1, MEMORY // 2):
        tokens = text[None, begin : begin + MEMORY]
        jax.block_until_ready(_logits(model, variables, tokens, positions))
    return len(text)


def _sliding(model: Transformer, variables: Variables, text: np.ndarray) -> int:
    """The last tokens of the text, each from the window that ends with it."""
    first = len(text) - RECOMPUTED_TOKENS
    for begin in range(first, len(text), RECOMPUTED_AT_ONCE):
        ends = range(begin + 1, begin + 1 + RECOMPUTED_AT_ONCE)
        tokens = np.stack([text[end - MEMORY : end] for end in ends])
        positions = np.broadcast_to(np.arange(MEMORY, dtype=np.int32), tokens.shape)
        jax.block_until_ready(_last_logits(model, variables, tokens, positions))
    return RECOMPUTED_TOKENS


def _largest_difference(model: Transformer, variables: Variables, text: np.ndarray) -> float:
    """Between memory's logits and those of whole texts that end at the places checked."""
    ours = np.concatenate(_segments(model, variables, text[:MEMORY]))
    places = np.linspace(0, MEMORY - 1, CHECKED).astype(int)
    worst = 0.0
    for begin in range(0, CHECKED, RECOMPUTED_AT_ONCE):
        some = places[begin : begin + RECOMPUTED_AT_ONCE]
        tokens = np.broadcast_to(text[:MEMORY], (len(some), MEMORY))
        everywhere = np.arange(MEMORY, dtype=np.int32)
        positions = np.where(everywhere[None] <= some[:, None], everywhere[None], -1)
        theirs = _last_logits(model, variables, tokens, positions)
        worst = max(worst, float(np.abs(ours[some] - theirs).max()))
    return worst


def _draw(rates: dict[str, list[float]]) -> Picture:
    figure, axes = new_figure(7.5, 2.4)
    for place, (name, color) in enumerate(zip(rates, (BLUE, ORANGE, SOFT), strict=True)):
        middle = float(np.median(rates[name]))
        axes.barh(-place, middle, color=color, height=0.6)
        axes.annotate(f" {middle:,.0f}", (middle, -place), va="center")
    axes.set_yticks([0, -1, -2], list(rates))
    axes.set_xscale("log")
    axes.set_xlim(right=4 * np.median(rates["memory"]))
    axes.set_xlabel("tokens evaluated per second")
    return to_picture(figure, "recurrence", "Evaluation of a text in three ways.")
