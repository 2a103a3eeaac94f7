"""A small model that answers what a calibrated router holds simple, beside the large one: how much
stays with it, and what is lost.

A question is the beginning of a row of held-out text; an answer's score is the share of the tokens
after it that a model says right, each after the true ones before.

N questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.ablations.base import Finding, Report, Target
from benchmarks.ablations.smaller import student
from benchmarks.ablations.training import (
    Trained,
    corpus_batches,
    paired,
    small_run,
    spread_rows,
    standard_library,
    train,
)
from configs.architecture import ModelConfig
from configs.models import v31_nano
from data.packing import PackedRows
from infer.query_router import Report as Routing
from infer.query_router import Router, calibrate, features_of, judge
from infer.score import TokenScores, score_documents
from infer.scored_questions import Question
from train.report import BLUE, ORANGE, SOFT, Picture, new_figure, to_picture

LARGE_STEPS, SMALL_STEPS = 400, 200
QUESTION, ANSWER = 96, 16
"""Tokens."""
CALIBRATED, JUDGED = 512, 512
"""Questions."""
TARGET = 0.95
"""Of the gap between the models, which the threshold is chosen to keep."""
BATCH = 16


@dataclass(frozen=True)
class Asked:
    """Questions that both models have answered."""

    features_NF: np.ndarray
    """As the small model sees each question."""
    scores_N2: np.ndarray
    """Of the small model's answer and of the large one's."""


@dataclass(frozen=True)
class Routed:
    """What a router does with questions that it was not calibrated on."""

    routing: Routing
    simple_share: float
    """Of questions that the small model answers as well, those that stay with it."""


def run(seeds: int) -> Report:
    text = standard_library().held_out()
    rows = spread_rows(PackedRows(text, QUESTION + ANSWER), CALIBRATED + JUDGED)
    found = [_of_seed(seed, rows["tokens"]) for seed in range(seeds)]
    sizes = v31_nano().num_active_parameters, student().num_active_parameters
    return Report(
        title="offloading: a small model beside the large one, behind a router",
        article="95% of simple queries are answered on the CPU by dynamic computation offloading",
        bound="routing that knows both scores; with no more than chance the share recovered is the "
        "share of calls",
        setting=f"large: v31_nano, {sizes[0]:,} active parameters, {LARGE_STEPS} steps of 4,096 "
        f"tokens of the standard library; small: dense, {sizes[1]:,}, {SMALL_STEPS} steps; "
        f"questions of {QUESTION} held-out tokens, scored by the {ANSWER} after them; "
        f"{CALIBRATED} to calibrate on for {TARGET:.0%} of the gap, {JUDGED} others to judge by",
        findings=findings_of(found),
        picture=_draw([r.routing for r in found]),
        notes=[
            "A question is simple where the small model's score is no worse: such questions are "
            "known to be so afterwards only.",
        ],
    )


def _of_seed(seed: int, tokens_NL: np.ndarray) -> Routed:
    models = [
        _trained(f"{name}, seed {seed}", model, steps, seed)
        for name, model, steps in (
            ("small", student(), SMALL_STEPS),
            ("large", v31_nano(), LARGE_STEPS),
        )
    ]
    order = np.random.default_rng(seed).permutation(len(tokens_NL))
    asked = _ask(models[0], models[1], tokens_NL[order])
    questions = [Question("", *scores) for scores in asked.scores_N2[:CALIBRATED]]
    features_NF = asked.features_NF[:CALIBRATED]
    router = calibrate(questions, features_NF, small="small", target=TARGET, seed=seed)
    rest = Asked(asked.features_NF[CALIBRATED:], asked.scores_N2[CALIBRATED:])
    return routed(router, rest)


def routed(router: Router, asked: Asked) -> Routed:
    """The router's work on these questions."""
    probability_N = router.probabilities(asked.features_NF)
    is_simple_N = asked.scores_N2[:, 0] >= asked.scores_N2[:, 1]
    stays_N = probability_N >= router.threshold
    return Routed(
        judge(probability_N, asked.scores_N2, router.threshold), float(stays_N[is_simple_N].mean())
    )


def _trained(label: str, model: ModelConfig, steps: int, seed: int) -> Trained:
    config = small_run(model, steps=steps, seed=seed)
    return train(config, corpus_batches(config), label)


def _ask(small: Trained, large: Trained, tokens_NL: np.ndarray) -> Asked:
    """What both make of the same texts; the small model's features see the questions alone."""
    documents = [np.asarray(row, np.int32) for row in tokens_NL]
    length = QUESTION + ANSWER - 1
    by_model = [
        score_documents(m.model, m.variables, documents, length=length, batch_size=BATCH)
        for m in (small, large)
    ]
    scores = [[right(s, d) for s, d in zip(x, documents, strict=True)] for x in by_model]
    return Asked(
        np.array([seen(s, d) for s, d in zip(by_model[0], documents, strict=True)]),
        np.array(scores).T,
    )


def right(scored: TokenScores, document: np.ndarray) -> float:
    """The share of the answer's tokens that the model says."""
    return float((scored.best_ids[-ANSWER:] == document[-ANSWER:]).mean())


def seen(scored: TokenScores, document: np.ndarray) -> np.ndarray:
    """The question's features; nothing of the answer is in them."""
    count = QUESTION - 1
    return features_of(scored.nats[:count], scored.best_ids[:count] == document[1:QUESTION])


def findings_of(found: Sequence[Routed]) -> list[Finding]:
    def of(name: str, values: list[float], target: Target | None = None) -> Finding:
        return Finding(name=name, values=tuple(values), target=target)

    routings = [r.routing for r in found]
    return [
        of("small model alone: share of tokens right", [r.small_quality for r in routings]),
        of("large model alone", [r.large_quality for r in routings]),
        of("both, behind the router", [r.quality for r in routings]),
        of(
            "simple questions that stay with the small model",
            [r.simple_share for r in found],
            Target(limit=0.95),
        ),
        of("all questions that stay with it", [1 - r.call_share for r in routings]),
        of("gap recovered", [r.pgr for r in routings], Target(limit=TARGET)),
        paired(
            "gap recovered, less at random with as many calls",
            [r.pgr for r in routings],
            [r.random_pgr for r in routings],
            Target(limit=0.0),
        ),
        of("gap recovered on average over all shares", [r.apgr for r in routings]),
        of("the same, knowing both scores", [r.oracle_apgr for r in routings]),
        of("distance of probabilities from outcomes", [r.calibration_error for r in routings]),
    ]


def _draw(routings: Sequence[Routing]) -> Picture:
    figure, axes = new_figure(6, 4)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, label="at random")
    calls = [r.call_share for r in routings]
    axes.plot(calls, [r.pgr for r in routings], "o", color=BLUE, label="by the router")
    axes.axhline(TARGET, color=ORANGE, linewidth=1, label="meant")
    axes.set_xlabel("share of questions that the large model answers")
    axes.set_ylabel("gap recovered")
    axes.legend(frameon=False)
    return to_picture(figure, "offloading", "What is kept of the large model's quality, by seed.")
