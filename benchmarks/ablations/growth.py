"""From 64 to 128 experts in mid-run, by each exact operator, against 128 from the start."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations import balance
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
from configs.base import RunConfig
from data.pipeline import Batch
from model.growth import Operator, grow, grown_config
from model.transformer import Transformer, Variables, hidden_states, output_weights
from parallel.mesh import make_mesh
from train.growth import grow_optimizer_state
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture
from train.state import TrainState, init_state, make_train_setup

BEFORE, AFTER = 80, 90
"""Steps with 64 experts, and with 128."""
WARMUP = 50
SMOOTHED = 10
"""Steps over which an expert's load is averaged."""
HELD_OUT_TOKENS, COMPARED_ROWS = 65_536, 8
SCRATCH = "128 from scratch"
ARMS: dict[str, tuple[Operator, int | None]] = {
    "reserve, warm-up": ("reserve", WARMUP),
    "copy": ("copy", None),
    "split": ("split", None),
}
JUDGED = "reserve, warm-up"


def run(seeds: int) -> Report:
    rows = held_out_rows(HELD_OUT_TOKENS, 256)
    divergence = {name: [] for name in ARMS}
    entered = {name: [] for name in ARMS}
    nats = {name: [] for name in (*ARMS, SCRATCH)}
    curves: dict[str, np.ndarray] = {}
    for seed in range(seeds):
        parent = _parent(seed)
        for name, (operator, warmup) in ARMS.items():
            grown = _grown(parent, operator, warmup, f"{name}, seed {seed}")
            divergence[name].append(grown.divergence)
            entered[name].append(_steps_until_in_range(grown.trained))
            held = evaluate_held_out(grown.trained.model, grown.trained.variables, rows)
            nats[name].append(held.nats)
            curves.setdefault(name, np.concatenate([parent.losses, grown.trained.losses]))
        config = small_run(_model(128), steps=BEFORE + AFTER, seed=seed)
        config = _scheduled(config, decay=0.7 * AFTER / (BEFORE + AFTER))
        scratch = train(config, corpus_batches(config), f"{SCRATCH}, seed {seed}")
        nats[SCRATCH].append(evaluate_held_out(scratch.model, scratch.variables, rows).nats)
        curves.setdefault(SCRATCH, scratch.losses)
    return Report(
        title="growth: 64 to 128 experts in mid-run",
        article="experts grow from 64 to 128; cold start of experts",
        bound="exact operators change nothing at the step itself: KL 0 but for rounding",
        setting=f"standard library, {BEFORE} steps of 4,096 tokens with 64 experts, {AFTER} more "
        f"with 128; two layers of width 128, quantile balance; warm-up of {WARMUP} "
        "steps; optimiser state grown with the weights; equal tokens; copy has twice the active "
        "expert FLOPs, the others the same",
        findings=_findings(divergence, entered, nats),
        picture=_draw(curves),
        notes=[f"inf steps until in range means: not within the {AFTER} steps after growth."],
    )


@dataclasses.dataclass(frozen=True)
class _Grown:
    trained: Trained
    divergence: float
    """KL of the grown model from its parent at the step of growth, nats per token."""


def _model(num_experts: int):
    return balance.model(num_experts, **balance.ARMS["quantile"])


def _scheduled(config: RunConfig, decay: float) -> RunConfig:
    """The learning rate falls over the last `decay` of the steps."""
    optimizer = dataclasses.replace(config.optimizer, decay_fraction=decay, warmup_steps=10)
    return dataclasses.replace(config, optimizer=optimizer)


def _parent(seed: int) -> Trained:
    config = _scheduled(small_run(_model(64), steps=BEFORE, seed=seed), decay=1 / BEFORE)
    return train(config, corpus_batches(config), f"64 experts, seed {seed}")


def _grown(parent: Trained, operator: Operator, warmup: int | None, label: str) -> _Grown:
    old = parent.run
    model = grown_config(old.model, operator, 2, warmup)
    config = _scheduled(dataclasses.replace(old, steps=AFTER, model=model), decay=0.7)
    variables = grow(parent.variables, old.model, operator, warmup_steps=warmup)
    rows = held_out_rows(COMPARED_ROWS * 256, 256)
    divergence = _divergence(parent, Transformer(model), variables, rows)
    data = corpus_batches(dataclasses.replace(old, steps=BEFORE + AFTER))
    for _ in range(BEFORE):  # the rows that the parent has seen
        next(data)
    state = _begin(parent, config, operator, variables)
    return _Grown(train(config, data, label, state=state), divergence)


def _begin(
    parent: Trained, config: RunConfig, operator: Operator, variables: Variables
) -> TrainState:
    mesh = make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        setup, old = make_train_setup(config, mesh), make_train_setup(parent.run, mesh)
        params = old.abstract_state.params
        opt_state = grow_optimizer_state(parent.state.opt_state, params, operator)
        return init_state(setup, config.seed, variables, opt_state)


def _divergence(parent: Trained, model: Transformer, variables: Variables, rows: Batch) -> float:
    def log_probs(model: Transformer, variables: Variables) -> jax.Array:
        hidden_BLD, _ = hidden_states(model, variables, rows["tokens"], rows["positions"])
        return jax.nn.log_softmax(hidden_BLD @ output_weights(model, variables))

    before = jax.jit(lambda v: log_probs(parent.model, v))(parent.variables)
    after = jax.jit(lambda v: log_probs(model, v))(variables)
    return float((jnp.exp(before) * (before - after)).sum(axis=-1).mean())


def _steps_until_in_range(trained: Trained) -> float:
    """Steps until every new expert's load lies within 0.5 to 2 times the mean; inf for never."""
    loads = np.array(
        [[layer["expert_load"] for layer in step.values()] for step in trained.router]
    )  # [steps, layers of the pattern, periods, E]
    new = loads[..., loads.shape[-1] // 2 :]
    for step in range(SMOOTHED, len(new) + 1):
        mean = new[step - SMOOTHED : step].mean(axis=0)
        if ((mean >= 0.5) & (mean <= 2.0)).all():
            return step
    return math.inf


def _findings(divergence, entered, nats) -> list[Finding]:
    found = []
    for name in ARMS:
        found.append(
            Finding(
                name=f"{name}: KL at the growth step, nats",
                values=tuple(divergence[name]),
                target=Target(limit=1e-6, at_most=True),
            )
        )
        found.append(
            Finding(
                name=f"{name}: steps until each new expert has 0.5 to 2 times the mean load",
                values=tuple(entered[name]),
                target=Target(limit=200, at_most=True) if name == JUDGED else None,
            )
        )
        found.append(
            paired(f"{name}: loss less {SCRATCH}'s, nats", nats[name], nats[SCRATCH], None)
        )
    return found


def _draw(curves: dict[str, np.ndarray]) -> Picture:
    figure, axes = new_figure(7.5, 3.6)
    colors = (BLUE, ORANGE, "#5a8f4e", SOFT)
    for (name, losses), color in zip(curves.items(), colors, strict=True):
        smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
        axes.plot(np.arange(5, len(losses) + 1), smooth, color=color, label=name, linewidth=1.4)
    axes.axvline(BEFORE, color=SOFT, linestyle=":")
    axes.annotate(" growth", (BEFORE, 6.2), color=SOFT)
    axes.set_ylim(top=6.5)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False)
    return to_picture(figure, "growth", "Training loss before and after growth, first seed.")
