"""A model of ours under evaluation: any source, mesh and weight format, asked in batches."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.checks import require, require_text
from data.tokenizers.public_tokenizer import PublicTokenizer
from evals.generation import Generator
from evals.likelihood import encode_pair, first_id, score_pairs
from evals.samples import Answer, Likelihood, Prompt, Rolling
from infer.score import TokenScores, score_documents
from model.transformer import Transformer, Variables

BATCH_TOKENS = 2048
"""Tokens that a batch reads, more or less, where nobody says."""

Progress = Callable[[int], None]
"""Called with the number of samples done so far."""


def _silent(_: int) -> None: ...


@dataclass(frozen=True)
class LocalModel:
    """The three verbs (evals/samples.py), and a fourth for tokens of a run's own held-out text."""

    model: Transformer
    variables: Variables
    find_tokenizer: Callable[[], PublicTokenizer]
    """Raises UserError where there is none: only tasks with text need one."""
    mesh: Mesh | None = None
    window: int = 1024
    """Tokens of a window or segment in which long texts are read; the context at most."""
    batch_tokens: int = BATCH_TOKENS
    max_rows: int = 16
    """Answers generated at once."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_rows", "window"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")

    @property
    def context_length(self) -> int:
        return self.model.config.context_length

    @cached_property
    def tokenizer(self) -> PublicTokenizer:
        """
        Raises:
          UserError: the model has none.
        """
        return self.find_tokenizer()

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: Progress = _silent
    ) -> list[Likelihood]:
        """Of each (context, continuation); see evals/likelihood.py."""
        encoded = [encode_pair(self.tokenizer, *pair, self.context_length) for pair in pairs]
        with self._in_mesh():
            return score_pairs(
                self.model,
                self.variables,
                encoded,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )

    def rolling(self, texts: Sequence[str], progress: Progress = _silent) -> list[Rolling]:
        """Each text after the token that begins one, in windows as infer/score.py has them."""
        for text in texts:
            require_text(text, "a text")
        begin = first_id(self.tokenizer)
        tokens = [
            np.array([begin, *self.tokenizer.encode(text, bos=False)], np.int32) for text in texts
        ]
        full = [i for i, t in enumerate(tokens) if len(t) > 1]
        scores = dict(zip(full, self.score_tokens([tokens[i] for i in full]), strict=True))
        progress(len(texts))
        return [
            Rolling(
                -float(scores[i].nats.sum(dtype=np.float64)) if i in scores else 0.0,
                len(tokens[i]) - 1,
                len(text.encode()),
            )
            for i, text in enumerate(texts)
        ]

    def score_tokens(self, documents: Sequence[np.ndarray]) -> list[TokenScores]:
        """Of each document's tokens after its first, int32 [n], n >= 2."""
        if not documents:
            return []
        with self._in_mesh():
            return score_documents(
                self.model,
                self.variables,
                list(documents),
                length=self.window,
                batch_size=max(self.batch_tokens // self.window, 1),
            )

    def generate(
        self, prompts: Sequence[Prompt], progress: Progress = _silent
    ) -> list[list[Answer]]:
        """num_answers of each prompt; see evals/generation.py."""
        generator = Generator(self.model, self.variables, self.tokenizer, self.mesh, self.max_rows)
        return generator.answers(prompts, progress)

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
