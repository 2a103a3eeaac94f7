"""One to three experts per token against a fixed two: loss, first-token latency, throughput."""

import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import (
    Trained,
    corpus_batches,
    evaluate_held_out,
    held_out_rows,
    paired,
    ratio,
    small_run,
    train,
)
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import MoEConfig, RouterConfig
from infer.generate import generate
from model.transformer import Transformer, Variables
from model.unstacked import unstack
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture

STEPS, SEQ_LEN = 100, 256
HELD_OUT_TOKENS = 65_536
PROMPT_TOKENS, REQUESTS = 512, 60
BATCH, NEW_TOKENS, ROUNDS = 8, 24, 5
JUDGED_STEPS = 20
FIXED, SAME, FEWER = "fixed 2", "mean 2.0", "mean 1.5"
Served = tuple[Transformer, Variables]
ARMS: dict[str, RouterConfig] = {
    FIXED: RouterConfig(top_k=2),
    SAME: RouterConfig(top_k=3, num_null_experts=2, target_k=2.0),
    FEWER: RouterConfig(top_k=3, num_null_experts=2, target_k=1.5),
}


def model(router: RouterConfig) -> ModelConfig:
    """Two layers of width 128 with 16 experts wide enough that they are most of the work."""
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=2,
        pattern=(
            LayerSpec(
                attention=AttentionConfig(
                    num_heads=4, num_kv_heads=2, head_dim=32, window_size=128, num_sink_tokens=4
                ),
                ffn=MoEConfig(num_experts=16, d_ff=512, router=router),
            ),
        ),
        context_length=1024,
    )


def expert_share() -> float:
    """The part of a forward pass's multiplications that two experts per token take."""
    fixed, d_model = model(ARMS[FIXED]), 128
    experts = fixed.num_layers * 2 * 3 * d_model * 512
    keys = 128 * 4 * 32 * 2 * fixed.num_layers  # scores and values of a full window
    # A prefill makes logits of one place only, so the output layer is left out.
    weights = fixed.num_active_parameters - 2 * fixed.vocab_size * d_model
    return experts / (weights + keys)


def run(seeds: int) -> Report:
    rows = held_out_rows(HELD_OUT_TOKENS, SEQ_LEN)
    nats: dict[str, list[float]] = {name: [] for name in ARMS}
    held_k: dict[str, list[float]] = {name: [] for name in ARMS}
    trained_k: dict[str, list[float]] = {name: [] for name in ARMS}
    latencies, rates = [], []
    for seed in range(seeds):
        arms = {}
        for name, router in ARMS.items():
            config = small_run(model(router), steps=STEPS, seed=seed, seq_len=SEQ_LEN)
            arms[name] = train(config, corpus_batches(config), f"{name}, seed {seed}")
            held = evaluate_held_out(arms[name].model, arms[name].variables, rows)
            nats[name].append(held.nats)
            held_k[name].append(held.load()["mean_k"])
            trained_k[name].append(_mean_k(arms[name]))
        served = {name: unstack(arm.model, arm.variables) for name, arm in arms.items()}
        latencies.append(_first_token_seconds(served, rows["tokens"]))
        rates.append(_decode_rates(served, rows["tokens"]))
    share = expert_share()
    findings = [Finding(name=f"{name}: held-out nats", values=tuple(nats[name])) for name in ARMS]
    for name in (SAME, FEWER):
        target = ARMS[name].target_k
        assert target is not None
        off, held_off = (
            tuple(abs(k / target - 1) for k in series[name]) for series in (trained_k, held_k)
        )
        findings += [
            paired(f"{name}: loss less fixed 2's, nats", nats[name], nats[FIXED], None),
            Finding(
                name=f"{name}: mean k of the last {JUDGED_STEPS} steps off its target",
                values=off,
                target=Target(limit=0.02, at_most=True),
            ),
            Finding(name=f"{name}: held-out mean k off its target", values=held_off),
            *_speed_findings(name, latencies, rates),
        ]
    return Report(
        title="dynamic_experts: one to three experts per token against two",
        article="first packet -37%, throughput +22% with one to three experts per token (P99 "
        "820 to 510 ms)",
        bound=f"two experts are {share:.0%} of a prefill's multiplications, so a mean of 1.5 saves "
        f"{share / 4:.0%} at most, and a mean of 2.0 nothing",
        setting=f"standard library, {STEPS} steps of 4,096 tokens, two layers of width 128, 16 "
        f"experts of width 512; latency of {REQUESTS} prompts of {PROMPT_TOKENS} tokens one at a "
        f"time, throughput of {BATCH} rows for {NEW_TOKENS} tokens, arms in turn; equal steps and "
        "data; active FLOPs equal for fixed 2 and mean 2.0",
        findings=findings,
        picture=_draw(latencies),
        notes=[
            "P99 of so few requests is near their maximum: read it with its spread.",
            "The controller holds the mean of the tokens that it sees, those of training; other "
            "text asks for as many experts as it needs.",
        ],
    )


def _mean_k(trained: Trained) -> float:
    """Experts per token of the last steps of training, over all layers."""
    steps = [np.mean([layer["mean_k"] for layer in step.values()]) for step in trained.router]
    return float(np.mean(steps[-JUDGED_STEPS:]))


def _first_token_seconds(arms: dict[str, Served], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds to the first token of each request, the arms one after the other on each prompt."""
    stream = tokens.reshape(-1)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(REQUESTS + 1):
        prompt = stream[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS].tolist()
        for name, arm in arms.items():
            made = generate(*arm, [prompt], max_new_tokens=1)
            if i:  # the first one compiles
                seconds[name].append(made.first_token_seconds)
    return {name: np.array(values) for name, values in seconds.items()}


def _decode_rates(arms: dict[str, Served], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens per second of a batch, by round."""
    prompts = [row[:64].tolist() for row in tokens[:BATCH]]
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(ROUNDS + 1):
        for name, arm in arms.items():
            made = generate(*arm, prompts, max_new_tokens=NEW_TOKENS)
            if i:
                rates[name].append(made.tokens_per_second)
    return {name: np.array(values) for name, values in rates.items()}


def _speed_findings(name, latencies, rates) -> list[Finding]:
    def by_seed(figure, series):
        return (
            [float(figure(seed[name])) for seed in series],
            [float(figure(seed[FIXED])) for seed in series],
        )

    p99 = lambda x: np.percentile(x, 99)  # noqa: E731
    return [
        ratio(
            f"{name}: median first-token time over fixed 2's", *by_seed(np.median, latencies), None
        ),
        ratio(f"{name}: P99 first-token time over fixed 2's", *by_seed(p99, latencies), None),
        ratio(f"{name}: decode tokens/s over fixed 2's", *by_seed(np.median, rates), None),
    ]


def _draw(latencies: list[dict[str, np.ndarray]]) -> Picture:
    figure, axes = new_figure(7.5, 3.6)
    for name, color in zip(ARMS, (SOFT, BLUE, ORANGE), strict=True):
        values = np.sort(np.concatenate([seed[name] for seed in latencies])) * 1e3
        axes.plot(values, np.arange(1, len(values) + 1) / len(values), color=color, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(f"milliseconds to the first token, {PROMPT_TOKENS}-token prompts")
    axes.set_ylabel("share of requests")
    axes.legend(frameon=False, loc="lower right")
    return to_picture(figure, "dynamic_experts", "Time to the first token.")
