"""A model of prose taught code at a tenth of what training on both again would take, in several
ways that keep what it knows, beside plain continuation.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import (
    Trained,
    evaluate_held_out,
    paired,
    small_run,
    train,
)
from benchmarks.ablations.two_domains import DOMAINS, held_out_of, prose_and_code
from configs.architecture import ModelConfig
from configs.base import InitConfig, RunConfig
from configs.data import MixturePhase
from configs.further import FurtherConfig
from configs.models import v31_nano
from configs.tuning import LoRAConfig
from data.pipeline import Batch, batches
from model.growth import grow, grown_config
from model.moe_layers import moe_layers
from model.transformer import Variables
from train.consolidation import fisher_information, with_fisher
from train.continual import continual_metrics
from train.loop import mesh_of
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture
from train.state import TrainState, init_state, make_train_setup
from train.step_cost import flops_per_step

JOINT_STEPS = 600
NEW_SHARE = COMPUTE = 0.1
"""Of the joint rows, the code; of joint training's FLOPs, what an arm has."""
ROWS, SEQ_LEN = 8, 256
HELD_OUT_TOKENS = 24_576
"""Of each domain."""
PEAK = 0.5
"""The rate that a schedule is warmed up to again, over the first training's."""
FISHER_ROWS = 32
FISHER_PASSES = 4 / 3
"""A training step's passes are three forward ones; the Fisher information draws targets, too."""
PLAIN = "plain"
TRIAL_SEED = 100
GAIN, FORGETTING = 0.97, 1.0
TARGETS = {
    "gain": Target(limit=GAIN),
    "forgetting": Target(limit=FORGETTING, at_most=True),
    "compute": Target(limit=COMPUTE, at_most=True),
}
MARKERS = "osv^D*PX"
Values = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to teach further; by itself plain continuation, warmed up again."""

    replay: float = 0.0
    """Share of prose in the rows."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Settings in place of the first training's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the run."""
    is_grown: bool = False
    """Whether each expert gets a twin, and the twins alone are trained."""


_ADAMW = {"kind": "adamw", "momentum": None}
ARMS: dict[str, Arm] = {
    PLAIN: Arm(),
    "plain, at the rate it ended with": Arm(
        optimizer={"learning_rate": 7.5e-4, "warmup_steps": 0, "final_ratio": 0.99}
    ),
    "replay of 25%": Arm(replay=0.25),
    "replay of 50%": Arm(replay=0.5),
    "EWC": Arm(settings={"further": FurtherConfig(consolidation=100.0, fisher_rows=FISHER_ROWS)}),
    "LoRA": Arm(
        optimizer=_ADAMW | {"learning_rate": 1e-2, "weight_decay": 0.0},
        settings={"lora": LoRAConfig(rank=16), "init": InitConfig(source="prose")},
    ),
    "experts only": Arm(settings={"trained": "experts"}),
    "new experts": Arm(is_grown=True),
}


def model() -> ModelConfig:
    """One period of v31_nano's layers."""
    return dataclasses.replace(v31_nano(), num_layers=2)


def run(seeds: int) -> Report:
    values: Values = {}
    for seed in range(seeds):
        for name, value in of_seed(seed).items():
            values.setdefault(name, []).append(value)
    return report(values)


def of_seed(seed: int) -> dict[str, float]:
    """Figures by name."""
    old_steps = round((1 - NEW_SHARE) * JOINT_STEPS)
    joint = _trained("joint", _run(model(), JOINT_STEPS, seed), NEW_SHARE)
    old = _trained("prose", _run(model(), old_steps, seed), 0.0)
    first, both = _scores(old), _scores(joint)
    found = {"prose: nats": -first[0], "prose: nats on code": -first[1]}
    found |= {"joint: nats": -both[0], "joint: nats on code": -both[1]}
    whole = flops_per_step(joint.run) * JOINT_STEPS
    for name, arm in ARMS.items():
        run, beside = arm_run(arm, whole, seed)
        scores = np.array([first, _scores(_taught(name, arm, run, old))])
        kept = continual_metrics(scores, before=scores[0])
        assert kept.backward_transfer is not None
        flops = run.steps * flops_per_step(run) + beside
        found |= {
            f"{name}: gain": (scores[1, 1] - first[1]) / (both[1] - first[1]),
            f"{name}: forgetting": 100 * kept.backward_transfer / first[0],
            f"{name}: compute": round(flops / whole, 6),
        }
    return found


def arm_run(arm: Arm, joint_flops: float, seed: int) -> tuple[RunConfig, float]:
    """The run of an arm, of as many steps as its share of joint training's FLOPs pays, and what of
    that it takes beside them.
    """
    beside, some = 0.0, _arm_run(arm, 100, seed)
    flops = flops_per_step(some)
    if some.further.consolidation:
        beside = FISHER_PASSES * flops * some.further.fisher_rows / ROWS
    steps = int((COMPUTE * joint_flops - beside) / flops + 1e-6)
    return _arm_run(arm, steps, seed), beside


def _arm_run(arm: Arm, steps: int, seed: int) -> RunConfig:
    kind, settings = model(), dict(arm.settings)
    if arm.is_grown:
        settings["further"] = FurtherConfig(frozen_experts=_num_experts(kind))
        kind = grown_config(kind, "copy")
    run = _run(kind, steps, seed)
    rate = {"learning_rate": PEAK * run.optimizer.learning_rate}
    optimizer = dataclasses.replace(run.optimizer, **(rate | dict(arm.optimizer)))
    return dataclasses.replace(run, optimizer=optimizer, **settings)


def _num_experts(kind: ModelConfig) -> int:
    (count,) = {layer.config.num_experts for layer in moe_layers(kind).values()}
    return count


def _run(kind: ModelConfig, steps: int, seed: int) -> RunConfig:
    return small_run(kind, steps=steps, seed=seed, seq_len=SEQ_LEN, batch_size=ROWS)


def _trained(label: str, run: RunConfig, share: float, **begin: Any) -> Trained:
    """
    Args:
      share: of code in the rows.
    """
    return train(run, _rows(run.seed, share), f"{label}, seed {run.seed}", **begin)


def _rows(seed: int, share: float, batch_size: int = ROWS) -> Iterator[Batch]:
    return batches(
        prose_and_code().training(),
        seq_len=SEQ_LEN,
        batch_size=batch_size,
        seed=seed,
        phases=[MixturePhase(0, (1 - share, share))],
    )


def _taught(name: str, arm: Arm, run: RunConfig, old: Trained) -> Trained:
    variables = old.variables
    if arm.is_grown:
        variables = grow(variables, old.run.model, "copy")
    begin: dict[str, Any] = {"variables": variables}
    if run.further.consolidation:
        begin = {"state": _consolidated(run, variables)}
    return _trained(name, run, 1 - arm.replay, **begin)


def _consolidated(run: RunConfig, variables: Variables) -> TrainState:
    """A state held near these weights by their Fisher information on prose."""
    rows = itertools.islice(_rows(run.seed, 0.0, 1), run.further.fisher_rows)
    named = ({k: row[k] for k in ("tokens", "targets", "positions")} for row in rows)
    mesh = mesh_of(run)
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        fisher = fisher_information(setup.model, variables, named, run.seed)
        opt_state = with_fisher(setup.optimizer.init(variables["params"]), fisher)
        return init_state(setup, run.seed, variables, opt_state)


@cache
def _held_out() -> dict[str, Batch]:
    return held_out_of(prose_and_code(), HELD_OUT_TOKENS, SEQ_LEN)


def _scores(trained: Trained) -> list[float]:
    """Minus the nats per token on each domain, as train/continual.py has them."""
    rows, model, variables = _held_out(), trained.model, trained.variables
    return [-evaluate_held_out(model, variables, rows[domain]).nats for domain in DOMAINS]


def report(values: Values) -> Report:
    sizes = f"{model().num_parameters:,} parameters, {model().num_active_parameters:,} active"
    steps = round((1 - NEW_SHARE) * JOINT_STEPS)
    return Report(
        title="incremental: a model of prose taught code at a tenth of joint training's compute",
        article="incremental training in place of training again",
        bound="joint training sees all text from the start; an arm's tenth pays for as many tokens "
        "of code as joint training has read, and replay takes of them",
        setting=f"one period of v31_nano's layers ({sizes}); prose: docstrings and help of the "
        "standard library, code: its modules without them, one tokenizer of both; prose "
        f"{steps} steps of {ROWS * SEQ_LEN:,} tokens, joint {JOINT_STEPS} steps with "
        f"{NEW_SHARE:.0%} code, from scratch; an arm goes on from prose for {COMPUTE:.0%} of "
        f"joint's FLOPs, warmed up again to {PEAK:g} of its rate unless it says otherwise; "
        f"{HELD_OUT_TOKENS:,} held-out tokens of each",
        findings=_findings(values),
        picture=_draw(values),
        notes=[
            "Gain: nats on code less than the model of prose has, over joint training's. "
            "Forgetting: nats on prose more than it has, in percent of its own (below 0: better). "
            "Both less plain continuation's, seed by seed, beside it. Compute counts model FLOPs "
            "and the Fisher information.",
            f"Rates and lambda are from trials on seed {TRIAL_SEED}, which is not among these. Of "
            "three seeds the 95% interval of a mean is 2.5 sd wide to each side.",
        ],
    )


def _findings(values: Values) -> list[Finding]:
    found = [
        Finding(name=name, values=tuple(own)) for name, own in values.items() if "nats" in name
    ]
    for name in ARMS:
        is_plain = name.startswith(PLAIN)
        for what, target in TARGETS.items():
            key = f"{name}: {what}"
            judged = None if is_plain and what != "compute" else target
            found.append(Finding(name=_full(key), values=tuple(values[key]), target=judged))
        if name != PLAIN:
            found += [
                paired(f"{name}: {what} less {PLAIN}'s", *_beside(values, name, what), None)
                for what in ("gain", "forgetting")
            ]
    holds = tuple(float(sum(held)) for held in zip(*_held(values).values(), strict=True))
    name = "ways that hold the whole claim: gain and forgetting, at that compute"
    return [*found, Finding(name=name, values=holds, target=Target(limit=1.0))]


def _full(key: str) -> str:
    units = {"gain": "gain over joint's", "forgetting": "forgetting, %", "compute": "compute"}
    name, what = key.split(": ")
    return f"{name}: {units[what]}"


def _beside(values: Values, name: str, what: str) -> tuple[list[float], list[float]]:
    return values[f"{name}: {what}"], values[f"{PLAIN}: {what}"]


def _held(values: Values) -> dict[str, list[bool]]:
    """Whether a method reaches all three targets, by seed."""
    return {
        name: [
            all(
                target.verdict(value) == "reached"
                for target, value in zip(TARGETS.values(), own, strict=True)
            )
            for own in zip(*(values[f"{name}: {what}"] for what in TARGETS), strict=True)
        ]
        for name in ARMS
        if not name.startswith(PLAIN)
    }


def _draw(values: Values) -> Picture:
    figure, axes = new_figure(7.5, 4.2)
    for name, marker in zip(ARMS, MARKERS, strict=True):
        gain, forgetting = (values[f"{name}: {what}"] for what in ("gain", "forgetting"))
        color = ORANGE if name.startswith(PLAIN) else BLUE
        axes.plot(gain, forgetting, marker, color=color, label=name)
    axes.axvline(GAIN, color=SOFT, linewidth=1)
    axes.axhline(FORGETTING, color=SOFT, linewidth=1)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_xlabel("gain on code, over joint training's")
    axes.set_ylabel("forgetting of prose, %")
    axes.legend(frameon=False)
    says = "What each way gains and forgets, a point per seed; the claim is the corner below right."
    return to_picture(figure, "incremental", says)
