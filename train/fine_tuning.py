"""Fine-tuning: on the next token of the assistant's turns in chats, and of nothing else; and on
preference pairs.

Chats are packed whole (data/packed_chats.py); what the loss doesn't count has no target. So the
objective is the mean over the assistant's tokens of a step, however they lie in its rows and
micro-batches.

B rows, c tokens of a chunk, V vocab.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.base import RunConfig
from configs.checks import require
from train.loop import FitResult, fit
from train.losses import cross_entropy


def fine_tune_on_preferences(run: RunConfig, run_dir: Path, **options: Any) -> FitResult:
    """Trains on preference pairs (train/preference.py) as train.loop.fit does.

    Args:
      options: as fit's, the objective excepted.
    Raises:
      UserError: a run without preference settings; and as fit.
    """
    require(
        run.preference is not None,
        f"{run.name} has no preference settings: choose a run that has, or train it by "
        "train.loop.fit",
    )
    return fit(run, run_dir, objective="preference", **options)


def fine_tune(run: RunConfig, run_dir: Path, **options: Any) -> FitResult:
    """Trains on chats as train.loop.fit does.

    Args:
      options: as fit's; without chunk_loss, `answer_loss` is minimised.
    Raises:
      UserError: a run whose data is no chats; and as fit.
    """
    require(
        run.data.form == "chat",
        f"{run.name} has data.form={run.data.form!r}, fine-tuning needs chats: set "
        "data.form='chat', or train it by train.loop.fit",
    )
    loss = cross_entropy if run.objective is not None else answer_loss  # fit refuses the former
    return fit(run, run_dir, **{"chunk_loss": loss, "objective": "fine_tuning", **options})


def answer_loss(
    logits_BcV: jax.Array, inputs: dict[str, jax.Array], shared: None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross-entropy summed over the assistant's tokens; reports also how many of them are the
    model's first choice ("accuracy").

    Args:
      inputs: "targets" int32 [B, c], -1 where the loss doesn't count.
    """
    loss, sums = cross_entropy(logits_BcV, inputs)
    is_right_Bc = logits_BcV.argmax(axis=-1) == inputs["targets"]
    accuracy = is_right_Bc.sum(dtype=jnp.float32)
    return loss, sums | {"accuracy": accuracy}
