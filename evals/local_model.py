"""A model of ours under evaluation: any source, mesh and weight format, asked in batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

BATCH_TOKENS = 4096
"""Tokens that a batch reads, more or less, where nobody says."""
BATCHES_AT_ONCE = 4
"""Batches of windows whose texts are scored together: so many are lost when it is interrupted."""


def _silent(index: int, answer: Any) -> None: ...


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
        self,
        pairs: Sequence[tuple[str, str]],
        on_answer: Callable[[int, Likelihood], None] = _silent,
    ) -> list[Likelihood]:
        """Of each (context, continuation); see evals/likelihood.py."""
        encoded = [encode_pair(self.tokenizer, *pair, self.context_length) for pair in pairs]
        with self._in_mesh():
            return score_pairs(
                self.model,
                self.variables,
                encoded,
                batch_tokens=self.batch_tokens,
                on_answer=on_answer,
            )

    def rolling(
        self, texts: Sequence[str], on_answer: Callable[[int, Rolling], None] = _silent
    ) -> list[Rolling]:
        """Each text after the token that begins one, in windows as infer/score.py has them."""
        for text in texts:
            require_text(text, "a text")
        begin = first_id(self.tokenizer)
        documents = [
            np.array([begin, *self.tokenizer.encode(text, bos=False)], np.int32) for text in texts
        ]
        sizes = [len(text.encode()) for text in texts]
        found: dict[int, Rolling] = {}

        def take(i: int, scores: TokenScores) -> None:
            nats = 0.0 - float(scores.nats.sum(dtype=np.float64))
            found[i] = Rolling(nats, len(scores.nats), sizes[i])
            on_answer(i, found[i])

        self.score_tokens(documents, take)
        return [found[i] for i in range(len(texts))]

    def score_tokens(
        self,
        documents: Sequence[np.ndarray],
        on_answer: Callable[[int, TokenScores], None] = _silent,
    ) -> list[TokenScores]:
        """Of each document's tokens after its first, int32 [n], n >= 1."""
        found: dict[int, TokenScores] = {}
        for part in self._parts(documents):
            full = [i for i in part if len(documents[i]) > 1]
            found |= dict.fromkeys(
                part, TokenScores(np.zeros(0, np.float32), np.zeros(0, np.int32))
            )
            if full:
                found |= dict(zip(full, self._score([documents[i] for i in full]), strict=True))
            for i in part:
                on_answer(i, found[i])
        return [found[i] for i in range(len(documents))]

    def _parts(self, documents: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Indices of the documents that are scored together: some batches, or one document."""
        part: list[int] = []
        size = 0
        for i, tokens in enumerate(documents):
            part.append(i)
            size += max(-(-len(tokens) // self.window), 1) * self.window
            if size >= BATCHES_AT_ONCE * self.batch_tokens:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _score(self, documents: list[np.ndarray]) -> list[TokenScores]:
        with self._in_mesh():
            return score_documents(
                self.model,
                self.variables,
                documents,
                length=self.window,
                batch_size=max(self.batch_tokens // self.window, 1),
            )

    def generate(
        self, prompts: Sequence[Prompt], on_answer: Callable[[int, list[Answer]], None] = _silent
    ) -> list[list[Answer]]:
        """num_answers of each prompt; see evals/generation.py."""
        generator = Generator(self.model, self.variables, self.tokenizer, self.mesh, self.max_rows)
        return generator.answers(prompts, on_answer)

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
