"""A model made smaller in four ways: a student of a thirteenth of its size, fewer experts, fewer
heads and channels, few bits for the weights that bear it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.training import (
    VOCAB,
    Trained,
    corpus_batches,
    evaluate_held_out,
    held_out_rows,
    paired,
    small_run,
    standard_library,
    train,
)
from compress.assignment import Choice, assigned, costs, fisher, weights_of
from compress.grids import Grid
from compress.importance import Sums, measure
from compress.layered import LayeredModel, layered
from compress.prune import ExpertScore
from compress.pruning import Pruning, pruned
from compress.rounding import in_floats, round_model
from compress.sizes import Budget
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.base import RunConfig
from configs.distill import DistillConfig
from configs.feed_forward import DenseConfig
from configs.models import v31_nano
from configs.optimizer import OptimizerConfig
from data.pipeline import Batch
from evals.tasks.stdlib_bpb import unigram_bits
from model.step import Step, make_step
from model.transformer import Transformer, Variables
from train.report import BLUE, SOFT, Picture, new_figure, to_picture
from train.teachers import Teacher

TEACHER_STEPS, STUDENT_STEPS, FEW_STEPS = 400, 800, 100
SEQ_LEN = 256
HELD_OUT_TOKENS, CALIBRATION_TOKENS = 65_536, 32_768
STUDENTS = {"student": STUDENT_STEPS, "student of few tokens": FEW_STEPS}
"""Steps by name: one reads twice what its teacher has read, the other a quarter of it."""
RECOVERY, LONG_RECOVERY = 0.02, 0.2
"""Shares of the teacher's tokens."""
SCORES: tuple[ExpertScore, ...] = ("reap", "frequency", "norm")
QUARTER, HALF = 0.75, 0.5
"""Shares of the experts that stay."""
JUDGED: dict[str, Callable[[float, np.random.RandomState], float]] = {
    "by sensitivity": lambda cost, random: cost,
    "at random": lambda cost, random: random.uniform(),
    "inverted": lambda cost, random: 1.0 / max(cost, 1e-12),
}
"""What a choice of few bits is held to cost."""
Values = dict[str, list[float]]


def student() -> ModelConfig:
    """A dense student of v31_nano, of its depth and a thirteenth of its parameters."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=48,
        num_layers=4,
        pattern=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=160)),),
        context_length=SEQ_LEN,
        tie_embeddings=True,
    )


def run(seeds: int) -> Report:
    rows = held_out_rows(HELD_OUT_TOKENS, SEQ_LEN)
    values: Values = {}
    for seed in range(seeds):
        for name, value in _of_seed(seed, rows).items():
            values.setdefault(name, []).append(value)
    sizes = {"teacher": v31_nano().num_parameters, "student": student().num_parameters}
    return Report(
        title="smaller: a model made smaller by distillation, pruning and few bits",
        article="175B distilled to 13B keeps 92%; pruning to 0.7; INT8 and INT4 on the edge",
        bound="what a student keeps is of the teacher's gain over unigrams in bits on held-out "
        "text; a teacher adds nothing to what enough text says",
        setting=f"teacher v31_nano ({sizes['teacher']:,} parameters), {TEACHER_STEPS} steps of "
        f"4,096 tokens of the standard library; student dense ({sizes['student']:,}, "
        f"{sizes['teacher'] / sizes['student']:.1f} times fewer), {STUDENT_STEPS} steps, or "
        f"{FEW_STEPS}; "
        f"{CALIBRATION_TOKENS:,} tokens to calibrate on, {HELD_OUT_TOKENS:,} held out; recovery "
        f"on {RECOVERY:.0%} of the teacher's tokens from its text, or {LONG_RECOVERY:.0%} with "
        "the teacher",
        findings=_findings(values),
        picture=_draw(values),
        notes=[
            "Few bits: int4 and int8 in blocks of 32, at the middle of their bytes, the same for "
            "all three assignments.",
        ],
    )


def _of_seed(seed: int, rows: Batch) -> dict[str, float]:
    """Figures by name: held-out nats, or nats more than the teacher's."""
    config = small_run(v31_nano(), steps=TEACHER_STEPS, seed=seed)
    teacher = train(config, corpus_batches(config), f"teacher, seed {seed}")
    nats = partial(_nats, rows)
    found = {"teacher": nats(teacher.model, teacher.variables), "unigrams": _unigram_nats(rows)}
    found |= _students(teacher, nats, seed)
    steps = _calibration(config)
    original = layered(teacher.model, teacher.variables)

    def lost(model: Transformer, variables: Variables) -> float:
        return nats(model, variables) - found["teacher"]

    found |= _pruned(teacher, original, measure(original, steps), lost)
    return found | _rounded(original, steps, lost, seed)


def _students(
    teacher: Trained, nats: Callable[[Transformer, Variables], float], seed: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, steps in STUDENTS.items():
        config = small_run(student(), steps=steps, seed=seed)
        alone = train(config, corpus_batches(config), f"{name} alone, seed {seed}")
        taught = _with_teacher(config, teacher, f"{name} with teacher, seed {seed}")
        found[f"{name} alone"] = nats(alone.model, alone.variables)
        found[f"{name} with teacher"] = nats(taught.model, taught.variables)
    return found


def _with_teacher(
    config: RunConfig, teacher: Trained, label: str, variables: Variables | None = None
) -> Trained:
    config = dataclasses.replace(config, distill=DistillConfig())
    beside = Teacher(teacher.model, teacher.variables, None)
    return train(config, corpus_batches(config), label, variables=variables, teacher=beside)


def _calibration(config: RunConfig) -> list[Step]:
    """Rows of the training text."""
    count = CALIBRATION_TOKENS // config.tokens_per_step
    batches = itertools.islice(corpus_batches(config), count)
    return [
        make_step(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]))
        for batch in batches
    ]


def _pruned(
    teacher: Trained,
    original: LayeredModel,
    sums: Sequence[Sums],
    lost: Callable[[Transformer, Variables], float],
) -> dict[str, float]:
    found: dict[str, float] = {}
    for share, what in ((QUARTER, "a quarter of the experts gone"), (HALF, "half of them gone")):
        for by in SCORES:
            small, _ = pruned(original, sums, Pruning(experts=share, by=by))
            found[f"{what}, by {by}"] = lost(*_whole(small))
            if by == "reap":
                found[f"{what}, recovered"] = lost(*_recovered(teacher, small, RECOVERY))
    cut = Pruning(budget=Budget(keep=0.7), axes=("heads", "ffn"))
    small, _ = pruned(original, sums, cut)
    found["0.7 of the layers kept"] = lost(*_whole(small))
    taught = _recovered(teacher, small, LONG_RECOVERY, is_taught=True)
    found["0.7 of the layers kept, recovered"] = lost(*taught)
    return found


def _whole(model: LayeredModel) -> tuple[Transformer, Variables]:
    config, variables = model.assembled()
    return Transformer(config, model.execution), variables


def _recovered(
    teacher: Trained, small: LayeredModel, share: float, *, is_taught: bool = False
) -> tuple[Transformer, Variables]:
    """A pruned model trained on by AdamW at a small rate, on a share of the teacher's tokens."""
    config, variables = small.assembled()
    steps = max(round(share * TEACHER_STEPS), 1)
    base = small_run(config, steps=steps, seed=teacher.run.seed + 1000)
    optimizer = OptimizerConfig(
        learning_rate=3e-4, schedule="wsd", warmup_steps=min(2, steps - 1), decay_fraction=0.7
    )
    run = dataclasses.replace(base, optimizer=optimizer)
    if is_taught:
        made = _with_teacher(run, teacher, "recovery with the teacher", variables)
    else:
        made = train(run, corpus_batches(run), "recovery", variables=variables)
    return made.model, made.variables


def _rounded(
    original: LayeredModel,
    steps: Sequence[Step],
    lost: Callable[[Transformer, Variables], float],
    seed: int,
) -> dict[str, float]:
    grids: list[Choice] = [Grid(kind, 32, "float16") for kind in ("int8", "int4")]
    weights = weights_of(original)
    options = costs(weights, grids, fisher(original, steps[:2]))
    budget = sum(sum(size for _, _, size in item) // 2 for item in options.values())
    random, found = np.random.RandomState(seed), {}
    for name, judged in JUDGED.items():
        own = {
            path: [(grid, judged(cost, random), size) for grid, cost, size in item]
            for path, item in options.items()
        }
        chosen = assigned(own, budget)
        assert chosen is not None, "the middle lies above the least"
        rounded = in_floats(round_model(original, chosen[0], ("rtn",), steps))
        found[f"few bits {name}"] = lost(*_whole(rounded))
    return found


def _nats(rows: Batch, model: Transformer, variables: Variables) -> float:
    return evaluate_held_out(model, variables, rows).nats


def _unigram_nats(rows: Batch) -> float:
    counts_V = np.bincount(np.asarray(standard_library().training().tokens), minlength=VOCAB)
    return float(unigram_bits(counts_V)[rows["targets"]].mean()) * math.log(2)


def _findings(values: Values) -> list[Finding]:
    kept = {
        name: [
            (unigrams - own) / (unigrams - teacher)
            for own, teacher, unigrams in zip(
                values[name], values["teacher"], values["unigrams"], strict=True
            )
        ]
        for name in (f"{name} {how}" for name in STUDENTS for how in ("alone", "with teacher"))
    }
    plain = ("teacher", "unigrams", *kept)
    targets = {
        "a quarter of the experts gone, by reap": Target(limit=0.01, at_most=True),
        "half of them gone, recovered": Target(limit=0.02, at_most=True),
        "0.7 of the layers kept, recovered": Target(limit=0.01, at_most=True),
    }
    return [
        *(Finding(name=f"{name}: held-out nats", values=tuple(values[name])) for name in plain),
        *(
            Finding(
                name=f"{name}: share kept of the teacher's gain over unigrams",
                values=tuple(share),
                target=Target(limit=0.92, stretch=0.96) if name == "student with teacher" else None,
            )
            for name, share in kept.items()
        ),
        *(
            paired(
                f"{name} with teacher less alone, nats",
                values[f"{name} with teacher"],
                values[f"{name} alone"],
                Target(limit=0.0, at_most=True),
            )
            for name in STUDENTS
        ),
        *(
            Finding(name=f"{name}: nats lost", values=tuple(found), target=targets.get(name))
            for name, found in values.items()
            if name not in plain
        ),
        *(
            paired(
                f"few bits by sensitivity less {other}, nats",
                values["few bits by sensitivity"],
                values[f"few bits {other}"],
                Target(limit=0.0, at_most=True),
            )
            for other in ("at random", "inverted")
        ),
    ]


def _draw(values: Values) -> Picture:
    names = [name for name in values if name != "unigrams"]
    teacher = np.array(values["teacher"])
    figure, axes = new_figure(7.5, 0.34 * len(names) + 0.8)
    for place, name in enumerate(reversed(names)):
        own = np.array(values[name])
        is_loss = name.startswith(("teacher", "student"))
        more = own - teacher if is_loss else own
        axes.plot(more, np.full(len(more), place), "o", color=BLUE, alpha=0.7)
    axes.axvline(0.0, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("nats more than the teacher's, a point per seed")
    return to_picture(figure, "smaller", "What each way of making a model smaller costs.")
