"""Leaving early against the whole depth: decoding speed and what it costs.

Two ways: a token leaves at the first exit that is sure enough, at a threshold with a certificate;
or an exit's layers draft and the rest verify, which costs no loss at all. Bytes of the
standard library, so that looking at an exit's 256 logits costs little.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import Trained, small_run, train
from configs.architecture import EarlyExitConfig, LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import DenseConfig
from data.corpora import read_documents, split
from data.pipeline import Batch
from infer.certificate import FULL_MODEL, certify, exit_risks, window_losses
from infer.generate import generate
from infer.generation import Generation
from infer.self_speculative import Draft
from model.transformer import Transformer, Variables
from model.unstacked import unstack
from train.progress import ProgressBar
from train.report import BLUE, INK, ORANGE, SOFT, Picture, new_panels, to_picture

STEPS, SEQ_LEN, BATCH_SIZE = 200, 256, 8
WINDOW, CALIBRATION, TEST = 129, 1500, 400
THRESHOLDS = tuple(np.round(1 - np.geomspace(0.005, 0.6, 12), 4).tolist())
DELTA, EPSILON = 0.005, 0.05
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 4, 64, 128, 5
WHOLE, STACKED, EXITS, DRAFTS = "whole depth", "whole depth, stacked", "certified exit", "drafts"
DRAFT = Draft(exit=2, length=6)


def model() -> ModelConfig:
    """Twelve layers of width 128 with an exit after every second."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
    layer = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=512))
    return ModelConfig(
        vocab_size=256,
        d_model=128,
        num_layers=12,
        pattern=(layer, layer),
        context_length=SEQ_LEN,
        early_exit=EarlyExitConfig(dropout=0.1, loss_scale=0.5, rotation=1, weighting="uniform"),
    )


def run(seeds: int) -> Report:
    speedups: dict[str, list[float]] = {EXITS: [], DRAFTS: []}
    layers, accepted, worse, certified = [], [], [], []
    curve: list[tuple[float, float]] = []
    for seed in range(seeds):
        trained = _train(seed)
        windows = held_out_windows(CALIBRATION + TEST, seed)
        risks = _risks(trained, windows[:CALIBRATION])
        certificate = certify(risks, THRESHOLDS, delta=DELTA, epsilon=EPSILON)
        threshold = FULL_MODEL if certificate.threshold is None else certificate.threshold
        certified.append(threshold)
        worse.append(_test_increase(trained, windows[CALIBRATION:], threshold))
        decoded = _decode(trained, windows[CALIBRATION:], threshold)
        for name, ratios in speedups.items():
            ratios += decoded.over_whole(name)
        layers.append(decoded.mean_layers)
        accepted.append(decoded.mean_accepted)
        curve = curve or list(zip(THRESHOLDS, certificate.risks, strict=False))
    config, target = model(), Target(limit=1.5, stretch=2.5)
    spacing = len(config.pattern)
    return Report(
        title="dynamic_depth: leaving early and drafting against the whole depth",
        article="dynamic compute layers: easy inputs take a shorter way",
        bound=f"one exit of {config.num_exits} at the earliest: {config.num_exits} times; drafts "
        f"of {DRAFT.length} by {DRAFT.exit * spacing} of {config.num_layers} layers, all right "
        f"and verified at the price of one token: {_draft_bound(config):.1f} times",
        setting=f"bytes of the standard library, twelve layers of width 128, exits after every "
        f"second, LayerSkip training with uniform weights for {STEPS} steps of "
        f"{BATCH_SIZE * SEQ_LEN:,} bytes; threshold by Learn-then-Test on at most {CALIBRATION} "
        f"held-out windows of {WINDOW - 1} bytes (relative loss increase above {DELTA:.1%} with "
        f"chance at most {EPSILON:.0%}); loss on {TEST} other windows; greedy decoding of "
        f"{PROMPTS} prompts one at a time, all ways in turn, against the faster of two whole-depth "
        "programs",
        findings=[
            Finding(
                name="drafts, then verified: decode tokens/s over whole depth (the same text)",
                values=tuple(speedups[DRAFTS]),
                target=target,
            ),
            Finding(name=f"tokens a draft of {DRAFT.length} gives", values=tuple(accepted)),
            Finding(
                name="certified exit: decode tokens/s over whole depth",
                values=tuple(speedups[EXITS]),
                target=target,
            ),
            Finding(
                name="certified exit: relative increase of test loss",
                values=tuple(worse),
                target=Target(limit=0.005, at_most=True),
            ),
            Finding(name="certified exit: layers run per token, of 12", values=tuple(layers)),
            Finding(name="certified threshold (2: none)", values=tuple(certified)),
        ],
        picture=_draw(curve, certified[0], speedups),
    )


def _draft_bound(config: ModelConfig) -> float:
    share = DRAFT.exit * len(config.pattern) / config.num_layers
    return DRAFT.length / (DRAFT.length * share + 1 - share)


@functools.cache
def _bytes() -> tuple[np.ndarray, np.ndarray]:
    """(training, held out) bytes of the standard library, uint8."""
    parts = split(read_documents("stdlib", ".py"), 0.05)
    joined = (b"".join(d.text.encode() for d in sorted(part)) for part in parts)
    training, held_out = (np.frombuffer(text, np.uint8) for text in joined)
    return training, held_out


def byte_batches(batch_size: int, length: int, seed: int) -> Iterator[Batch]:
    """Rows from random places of the training files."""
    random, text = np.random.RandomState(seed), _bytes()[0]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))
    while True:
        begins = random.randint(len(text) - length - 1, size=batch_size)
        rows = np.stack([text[b : b + length + 1] for b in begins]).astype(np.int32)
        yield {"tokens": rows[:, :-1], "targets": rows[:, 1:], "positions": positions}


def held_out_windows(count: int, seed: int) -> np.ndarray:
    """Windows of the held-out files that do not overlap, in random order, int32 [count, WINDOW]."""
    text = _bytes()[1]
    places = np.random.RandomState(5000 + seed).permutation(len(text) // WINDOW)[:count]
    return np.stack([text[p * WINDOW : (p + 1) * WINDOW] for p in places]).astype(np.int32)


def _train(seed: int) -> Trained:
    config = small_run(model(), steps=STEPS, seed=seed, seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    return train(config, byte_batches(BATCH_SIZE, SEQ_LEN, seed), f"twelve layers, seed {seed}")


def _risks(trained: Trained, windows: np.ndarray) -> Iterator[np.ndarray]:
    """Of one threshold after the other, with progress."""
    with ProgressBar("certifying", total=len(THRESHOLDS), unit="thresholds") as bar:
        risks = exit_risks(trained.model, trained.variables, windows, THRESHOLDS, batch_size=50)
        for done, risks_N in enumerate(risks, 1):
            bar.update(done, f"risk {risks_N.mean():.2%} at {THRESHOLDS[done - 1]}")
            yield risks_N


def _test_increase(trained: Trained, windows: np.ndarray, threshold: float) -> float:
    """Of the mean loss over all windows, windows that gain counted too."""
    whole, early = (
        window_losses(trained.model, trained.variables, windows, t, batch_size=50)
        for t in (FULL_MODEL, threshold)
    )
    return float(early.mean() / whole.mean() - 1)


@dataclass(frozen=True)
class _Decoded:
    rates: dict[str, list[float]]
    """Tokens per second by way, a value a round."""
    mean_layers: float
    mean_accepted: float

    def over_whole(self, name: str) -> list[float]:
        whole = np.maximum(self.rates[WHOLE], self.rates[STACKED])
        return (np.array(self.rates[name]) / whole).tolist()


def _decode(trained: Trained, windows: np.ndarray, threshold: float) -> _Decoded:
    """Greedy decoding of some prompts, each way in turn."""
    prompts = [window[:PROMPT_TOKENS].tolist() for window in windows[:PROMPTS]]
    stacked = (trained.model, trained.variables)
    apart = unstack(*stacked)
    ways: dict[str, Callable[[list[int]], Generation]] = {
        STACKED: lambda prompt: _continue(stacked, prompt),
        WHOLE: lambda prompt: _continue(apart, prompt),
        EXITS: lambda prompt: _continue(apart, prompt, exit_threshold=threshold),
        DRAFTS: lambda prompt: _continue(apart, prompt, draft=DRAFT),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    layers, accepted = [], []
    for turn in range(ROUNDS + 1):
        texts = {}
        for name, way in ways.items():
            made = [way(prompt) for prompt in prompts]
            texts[name] = [m.tokens for m in made]
            layers += [m.mean_layers for m in made if m.mean_layers is not None]
            accepted += [m.mean_accepted for m in made if m.mean_accepted is not None]
            if turn:  # the first one compiles
                rates[name].append(float(np.median([m.tokens_per_second for m in made])))
        assert texts[DRAFTS] == texts[WHOLE], "drafts changed the text"
    return _Decoded(rates, float(np.mean(layers)), float(np.mean(accepted)))


def _continue(model: tuple[Transformer, Variables], prompt: list[int], **way: Any) -> Generation:
    return generate(*model, [prompt], max_new_tokens=NEW_TOKENS, **way)


def _draw(
    curve: list[tuple[float, float]], threshold: float, speedups: dict[str, list[float]]
) -> Picture:
    figure, (risk, speed) = new_panels(9, 3.2, 2)
    thresholds, risks = np.array(curve).T
    risk.plot(thresholds, 100 * risks, "o-", color=BLUE, markersize=4)
    risk.axhline(100 * DELTA, color=ORANGE, linestyle=":")
    at = (thresholds.max(), 100 * DELTA)
    risk.annotate("what is allowed", at, color=ORANGE, va="bottom", ha="right")
    if threshold <= 1:
        risk.axvline(threshold, color=SOFT)
        risk.annotate(" certified", (threshold, 0), color=SOFT, va="bottom")
    risk.set_xlabel("exit threshold: lead of the best byte")
    risk.set_ylabel("loss increase, %")
    for place, ratios in enumerate(speedups.values()):
        speed.barh(-place, np.median(ratios), height=0.5, color=(SOFT, BLUE)[place])
        speed.plot(ratios, [-place] * len(ratios), ".", color=INK, markersize=4)
    speed.axvline(1.0, color=INK, linewidth=1)
    speed.axvline(1.5, color=ORANGE, linestyle=":")
    speed.annotate(" asked for", (1.5, 0.45), color=ORANGE, va="center", fontsize=8)
    speed.set_yticks([-place for place in range(len(speedups))], list(speedups))
    speed.set_xlabel("tokens/s over whole depth (dots: rounds)")
    return to_picture(figure, "dynamic_depth", "Risk of leaving early, first seed; speed.")
