"""A router that sees the tokens before against one that does not: a planted task, and real code."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import (
    Trained,
    corpus_batches,
    evaluate_held_out,
    held_out_rows,
    paired,
    small_run,
    train,
)
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import ContextConfig, MoEConfig, RouterConfig
from data.pipeline import Batch
from model.transformer import hidden_states, output_weights
from train.report import BLUE, ORANGE, Picture, new_figure, to_picture

FLAGS, WORDS, FILLERS = 4, 16, 12
PLANTED_LENGTH, PLANTED_STEPS = 64, 200
CODE_STEPS, HELD_OUT_TOKENS = 120, 65_536
WINDOW = 64
ARMS = ("plain", "context")


def run(seeds: int) -> Report:
    accuracy: dict[str, list[float]] = {name: [] for name in ARMS}
    nats: dict[str, list[float]] = {name: [] for name in ARMS}
    rows = held_out_rows(HELD_OUT_TOKENS, 256)
    curves: dict[str, np.ndarray] = {}
    for seed in range(seeds):
        for name in ARMS:
            config = small_run(
                planted_model(name), steps=PLANTED_STEPS, seed=seed, seq_len=PLANTED_LENGTH
            )
            trained = train(config, planted_batches(config.batch_size, seed), f"planted, {name}")
            accuracy[name].append(_accuracy(trained, seed))
            curves.setdefault(name, trained.losses)
            config = small_run(code_model(name), steps=CODE_STEPS, seed=seed)
            trained = train(config, corpus_batches(config), f"code, {name}, seed {seed}")
            nats[name].append(evaluate_held_out(trained.model, trained.variables, rows).nats)
    plain, context = code_model("plain"), code_model("context")
    return Report(
        title="context_router: a router that sees the tokens before against one that does not",
        article="attention-based dynamic routing matches tokens and experts by their context",
        bound=f"planted task: {best_without_flag():.1%} by the best guess without the flag; "
        "loss on code: none known",
        setting=f"planted: one layer whose attention sees one token, 8 experts, {PLANTED_STEPS} "
        f"steps; a word's successor depends on the flag that opens the row. Code: standard "
        f"library, {CODE_STEPS} steps of 4,096 tokens, two layers of width 128, 16 experts; "
        f"{plain.num_parameters / 1e6:.3f}M parameters plain, "
        f"{context.num_parameters / 1e6:.3f}M with context; active "
        f"{plain.num_active_parameters / 1e6:.3f}M and {context.num_active_parameters / 1e6:.3f}M",
        findings=[
            Finding(name="planted, plain: accuracy", values=tuple(accuracy["plain"])),
            Finding(
                name="planted, context: accuracy",
                values=tuple(accuracy["context"]),
                target=Target(limit=0.95),
            ),
            paired("code: context's loss less plain's, nats", nats["context"], nats["plain"], None),
        ],
        picture=_draw(curves),
        notes=[_verdict(nats)],
    )


def planted_model(arm: str) -> ModelConfig:
    """One layer in which only the router can see another token."""
    context = ContextConfig(kind="causal", window_size=WINDOW) if arm == "context" else None
    router = RouterConfig(top_k=2, context=context)
    return ModelConfig(
        vocab_size=FLAGS + 2 * WORDS + FILLERS,
        d_model=64,
        num_layers=1,
        pattern=(
            LayerSpec(
                attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32, window_size=1),
                ffn=MoEConfig(num_experts=8, d_ff=64, router=router),
            ),
        ),
        context_length=PLANTED_LENGTH,
    )


def planted_rows(random: np.random.RandomState, count: int) -> Batch:
    """Rows of a flag, then words and fillers; only the successors of words are asked for.

    Word w under flag f is followed by meaning permutation_f[w], one of as many symbols.
    """
    meanings = _meanings()
    flags_B = random.randint(FLAGS, size=count)
    is_word = random.rand(count, PLANTED_LENGTH) < 0.3
    words = random.randint(WORDS, size=is_word.shape)
    fillers = FLAGS + 2 * WORDS + random.randint(FILLERS, size=is_word.shape)
    tokens = np.where(is_word, FLAGS + words, fillers)
    tokens[:, 0], is_word[:, 0] = flags_B, False
    targets = np.where(is_word, FLAGS + WORDS + meanings[flags_B[:, None], words], -1)
    positions = np.broadcast_to(np.arange(PLANTED_LENGTH), tokens.shape)
    rows = {"tokens": tokens, "targets": targets, "positions": positions}
    return {name: x.astype(np.int32) for name, x in rows.items()}


def _meanings() -> np.ndarray:
    """Each flag's meaning of each word, [FLAGS, WORDS]."""
    return np.stack([np.random.RandomState(f).permutation(WORDS) for f in range(FLAGS)])


def best_without_flag() -> float:
    """Share of words whose meaning can be guessed by knowing the word alone."""
    common = [np.bincount(meanings).max() for meanings in _meanings().T]
    return float(np.mean(common) / FLAGS)


def nats_without_flag() -> float:
    """Entropy of a word's meaning where the word alone is known."""
    shares = [np.bincount(meanings) / FLAGS for meanings in _meanings().T]
    return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))


def planted_batches(batch_size: int, seed: int) -> Iterator[Batch]:
    random = np.random.RandomState(1000 + seed)
    while True:
        yield planted_rows(random, batch_size)


def code_model(arm: str) -> ModelConfig:
    """Two layers, local and global; the plain one's experts are wider by as many parameters."""
    context = ContextConfig(kind="causal", window_size=WINDOW) if arm == "context" else None
    width = 128 if arm == "context" else 132
    ffn = MoEConfig(
        num_experts=16,
        d_ff=width,
        num_shared_experts=1,
        router=RouterConfig(top_k=2, context=context),
    )
    everywhere = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
    local = dataclasses.replace(everywhere, window_size=64, num_sink_tokens=4)
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=2,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (local, everywhere)),
        context_length=256,
    )


def _accuracy(trained: Trained, seed: int) -> float:
    """Of the best guess for each word's successor, on fresh rows."""
    rows = planted_rows(np.random.RandomState(2000 + seed), 256)
    best = jax.jit(_best_tokens, static_argnums=0)(
        trained.model, trained.variables, rows["tokens"], rows["positions"]
    )
    asked = rows["targets"] >= 0
    return float((np.asarray(best) == rows["targets"])[asked].mean())


def _best_tokens(model, variables, tokens_BL, positions_BL) -> jax.Array:
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL)
    return jnp.argmax(hidden_BLD @ output_weights(model, variables), axis=-1)


def _verdict(nats: dict[str, list[float]]) -> str:
    differences = np.subtract(nats["context"], nats["plain"])
    spread = differences.std(ddof=1) if len(differences) > 1 else float("inf")
    error = spread / len(differences) ** 0.5
    if abs(differences.mean()) < 2 * error or not np.isfinite(error):
        return (
            f"On code: {differences.mean():+.4f} nats with a standard error of {error:.4f}, which "
            "is a null result: the hidden state that every router sees already holds the context."
        )
    return f"On code: {differences.mean():+.4f} nats, standard error {error:.4f}."


def _draw(curves: dict[str, np.ndarray]) -> Picture:
    figure, axes = new_figure(7.5, 3.6)
    for (name, losses), color in zip(curves.items(), (ORANGE, BLUE), strict=True):
        axes.plot(np.arange(1, len(losses) + 1), losses, color=color, label=name)
    floor = nats_without_flag()
    axes.axhline(floor, color=ORANGE, linestyle=":", linewidth=1)
    axes.annotate(
        f"least without the flag: {floor:.2f}",
        (len(curves["plain"]), floor - 0.08),
        ha="right",
        va="top",
        color=ORANGE,
        fontsize=8,
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss on planted homographs, nats")
    axes.legend(frameon=False)
    return to_picture(figure, "context_router", "The planted task, first seed.")
