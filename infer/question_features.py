"""What a small model makes of a question, for the router that decides who answers it."""

from collections.abc import Sequence

import numpy as np

from infer.query_router import features_of
from infer.score import score_documents
from model.transformer import Transformer, Variables

LENGTH = 256
"""Tokens that are looked at: the last of a question."""


class QuestionScorer:
    """Features of questions, by one pass of the small model over the last tokens of each."""

    def __init__(self, model: Transformer, variables: Variables) -> None:
        self._model, self._variables = model, variables
        self._length = min(LENGTH, model.config.context_length)

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        """The question's features [F] (infer/query_router.py).

        Raises:
          ValueError: fewer than two tokens.
        """
        if len(tokens) < 2:
            raise ValueError(f"a question needs two tokens to be looked at, got {len(tokens)}")
        document = np.asarray(tokens, np.int32)[-(self._length + 1) :]
        (scores,) = score_documents(
            self._model, self._variables, [document], length=self._length, batch_size=1
        )
        return features_of(scores.nats, scores.best_ids == document[1:])
