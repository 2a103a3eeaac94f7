"""Held-out loss while a run trains: the beginnings of files that it never sees.

Runs of one corpus are measured on the same tokens, so that their curves can be compared; training
losses can't, as each step has rows of its own.
"""

import json
from pathlib import Path

import numpy as np

from configs.base import RunConfig
from configs.checks import require
from data.pipeline import prepare_corpus
from infer.load import inference_model
from infer.score import score_documents
from model.transformer import Variables
from train.metrics import Line, read_lines

FILE = "held_out.jsonl"
COLUMNS = ("step", "cross_entropy")
MAX_FILES = 64
ROWS_AT_ONCE = 16


def read_held_out(run_dir: Path) -> list[Line]:
    """The lines that a run's `HeldOutLoss` wrote.

    Raises:
      UserError: there are none, or the file is damaged.
    """
    lines = read_lines(run_dir / FILE, COLUMNS)
    require(bool(lines), f"{run_dir / FILE} has no line: remove {run_dir} and train the run again")
    return lines


class HeldOutLoss:
    """A hook of `train.loop.fit` that adds a line to run_dir/held_out.jsonl now and then.

    A line has "step" and "cross_entropy", nats per token of the first seq_len targets of each file.
    """

    def __init__(self, run: RunConfig, run_dir: Path, *, every: int) -> None:
        """
        Args:
          every: steps between two measurements; the last step is always measured.
        """
        self.path, self.every, self.steps = run_dir / FILE, every, run.steps
        self._model, self._length = inference_model(run), run.data.seq_len
        self._corpus = prepare_corpus(run.data, run.model.vocab_size)

    def __call__(self, step: int, variables: Variables) -> None:
        """Measures after this step, if it is one of those; later lines are from before a resume."""
        if step % self.every and step != self.steps:
            return
        kept = [x for x in self.lines() if x["step"] < step]
        kept.append({"step": step, "cross_entropy": self.loss(variables)})
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)

    def lines(self) -> list[Line]:
        """What was measured so far."""
        return read_lines(self.path, COLUMNS) if self.path.exists() else []

    def loss(self, variables: Variables) -> float:
        """Nats per token of these variables."""
        scores = score_documents(
            self._model,
            variables,
            self._beginnings(),
            length=self._length,
            batch_size=ROWS_AT_ONCE,
        )
        return float(np.concatenate([score.nats for score in scores]).mean(dtype=np.float64))

    def _beginnings(self) -> list[np.ndarray]:
        documents = [tokens for _, tokens, _ in self._corpus.held_out().documents()]
        return [tokens[: self._length + 1] for tokens in documents[:MAX_FILES] if len(tokens) > 1]
