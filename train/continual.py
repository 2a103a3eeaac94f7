"""Stages of a model that is taught one thing after the other: what each stage gave and took.

R[i, j] is the score on task j after stage i, here minus the nats per token on its held-out text, so
that more is better (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018). T stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.report import Picture, new_figure, to_picture


@dataclass(frozen=True)
class ContinualMetrics:
    """Of the stages done so far; nats per token."""

    final: float
    """Mean score over the tasks seen, after the last stage."""
    backward_transfer: float | None
    """Mean change on earlier tasks since each was learnt; below 0: forgetting. None of one."""
    forgetting: float | None
    """Mean over earlier tasks of the best score so far minus the last one."""
    forward_transfer: float | None
    """Mean over later tasks of what the stages before gave, over the model before all."""


def continual_metrics(scores: np.ndarray, before: np.ndarray) -> ContinualMetrics:
    """
    Args:
      scores: R [stages done, T].
      before: the scores [T] before the first stage.
    """
    done = len(scores)
    last, earlier = scores[done - 1], range(done - 1)
    backward = [last[j] - scores[j, j] for j in earlier]
    forgetting = [scores[j:done, j].max() - last[j] for j in earlier]
    forward = [scores[j - 1, j] - before[j] for j in range(1, min(done + 1, scores.shape[1]))]
    return ContinualMetrics(
        final=float(np.mean(last[:done])),
        backward_transfer=float(np.mean(backward)) if backward else None,
        forgetting=float(np.mean(forgetting)) if forgetting else None,
        forward_transfer=float(np.mean(forward)) if forward else None,
    )


def as_table(names: Sequence[str], scores: np.ndarray, before: np.ndarray) -> str:
    """Nats per token on each task, a row for each stage, as aligned text."""
    width = max(12, *(len(name) + 2 for name in names))
    lines = ["after".ljust(width) + "".join(name.rjust(width) for name in names)]
    for name, row in zip(["(before)", *names], [before, *scores], strict=False):
        lines.append(name.ljust(width) + "".join(f"{-x:.4f}".rjust(width) for x in row))
    return "\n".join(lines)


def draw_stages(names: Sequence[str], scores: np.ndarray, before: np.ndarray) -> Picture:
    """Each task's nats per token over the stages."""
    figure, axes = new_figure(6.4, 3.6)
    every = np.concatenate([before[None], scores])
    for j, name in enumerate(names):
        axes.plot(range(len(every)), -every[:, j], marker="o", label=name)
        if j + 1 < len(every):
            axes.plot([j + 1], [-every[j + 1, j]], marker="s", markersize=9, color="#1f2933")
    axes.set_xticks(range(len(every)), ["before", *names[: len(scores)]])
    axes.set_xlabel("after the stage (square: the task's own)")
    axes.set_ylabel("nats per token, held out")
    axes.legend(frameon=False)
    return to_picture(figure, "stages", "Loss on each task's held-out text after every stage.")
