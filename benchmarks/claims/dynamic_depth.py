"""Early exit with a certificate against the whole depth: decoding speed and what it costs.

Bytes of the standard library, so that looking at an exit's 256 logits costs little.
"""

import functools
from collections.abc import Iterator

import numpy as np

from benchmarks.claims.base import Finding, Report, Target
from benchmarks.claims.training import Trained, small_run, train
from configs.architecture import (
    AttentionConfig,
    DenseConfig,
    EarlyExitConfig,
    LayerSpec,
    ModelConfig,
)
from data.corpora import read_documents, split
from data.pipeline import Batch
from infer.certificate import FULL_MODEL, certify, exit_risks, window_losses
from infer.generate import generate
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture

STEPS, SEQ_LEN, BATCH_SIZE = 200, 256, 16
WINDOW, CALIBRATION, TEST = 129, 1000, 400
THRESHOLDS = tuple(np.round(1 - np.geomspace(0.005, 0.6, 12), 4).tolist())
DELTA, EPSILON = 0.005, 0.05
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 4, 64, 128, 5


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
        early_exit=EarlyExitConfig(dropout=0.1, loss_scale=1.0, rotation=1),
    )


def run(seeds: int) -> Report:
    speedups, layers, worse, certified = [], [], [], []
    curve: list[tuple[float, float]] = []
    for seed in range(seeds):
        trained = _train(seed)
        windows = held_out_windows(CALIBRATION + TEST, seed)
        risks = exit_risks(
            trained.model, trained.variables, windows[:CALIBRATION], THRESHOLDS, batch_size=50
        )
        certificate = certify(risks, THRESHOLDS, delta=DELTA, epsilon=EPSILON)
        threshold = FULL_MODEL if certificate.threshold is None else certificate.threshold
        certified.append(threshold)
        worse.append(_test_increase(trained, windows[CALIBRATION:], threshold))
        rounds, mean_layers = _decode(trained, windows[CALIBRATION:], threshold)
        speedups += rounds
        layers.append(mean_layers)
        curve = curve or list(zip(THRESHOLDS, risks.mean(axis=1).tolist(), strict=True))
    config = model()
    return Report(
        title="dynamic_depth: early exit with a certificate against the whole depth",
        article="dynamic compute layers: easy inputs take a shorter way",
        bound=f"one exit of {config.num_periods} at the earliest: {config.num_periods} times",
        setting=f"bytes of the standard library, twelve layers of width 128, exits after every "
        f"second, LayerSkip training for {STEPS} steps of {BATCH_SIZE * SEQ_LEN:,} bytes; "
        f"threshold by Learn-then-Test on {CALIBRATION} held-out windows of {WINDOW - 1} bytes "
        f"(relative loss increase above {DELTA:.1%} with chance at most {EPSILON:.0%}); loss on "
        f"{TEST} other windows; decoding of {PROMPTS} prompts one at a time, both in turn",
        findings=[
            Finding(
                name="decode tokens/s, certified exit over whole depth",
                values=tuple(speedups),
                target=Target(limit=1.5, stretch=2.5),
            ),
            Finding(
                name="relative increase of test loss",
                values=tuple(worse),
                target=Target(limit=0.005, at_most=True),
            ),
            Finding(name="layers run per token, of 12", values=tuple(layers)),
            Finding(name="certified threshold (2: none)", values=tuple(certified)),
        ],
        picture=_draw(curve, certified[0]),
    )


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


def _test_increase(trained: Trained, windows: np.ndarray, threshold: float) -> float:
    """Of the mean loss over all windows, windows that gain counted too."""
    whole, early = (
        window_losses(trained.model, trained.variables, windows, t, batch_size=50)
        for t in (FULL_MODEL, threshold)
    )
    return float(early.mean() / whole.mean() - 1)


def _decode(trained: Trained, windows: np.ndarray, threshold: float) -> tuple[list[float], float]:
    """Tokens per second over the whole model's, by round, and the mean number of layers run."""
    prompts = [window[:PROMPT_TOKENS].tolist() for window in windows[:PROMPTS]]
    ratios, layers = [], []
    for turn in range(ROUNDS + 1):
        rates = []
        for exit_threshold in (None, threshold):
            made = [
                generate(
                    trained.model,
                    trained.variables,
                    [prompt],
                    max_new_tokens=NEW_TOKENS,
                    exit_threshold=exit_threshold,
                )
                for prompt in prompts
            ]
            rates.append(float(np.median([m.tokens_per_second for m in made])))
            layers += [m.mean_layers for m in made if m.mean_layers is not None]
        if turn:  # the first one compiles
            ratios.append(rates[1] / rates[0])
    return ratios, float(np.mean(layers))


def _draw(curve: list[tuple[float, float]], threshold: float) -> Picture:
    figure, axes = new_figure(7.5, 3.4)
    thresholds, risks = np.array(curve).T
    axes.plot(thresholds, 100 * risks, "o-", color=BLUE, markersize=4)
    axes.axhline(100 * DELTA, color=ORANGE, linestyle=":")
    axes.annotate("what is allowed", (0.45, 100 * DELTA), color=ORANGE, va="bottom")
    if threshold <= 1:
        axes.axvline(threshold, color=SOFT)
        axes.annotate(" certified", (threshold, axes.get_ylim()[1]), color=SOFT, va="top")
    axes.set_xlabel("exit threshold: lead of the best byte over the second")
    axes.set_ylabel("loss increase on calibration windows, %")
    return to_picture(figure, "dynamic_depth", "Risk of leaving early, first seed.")
