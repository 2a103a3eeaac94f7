"""How well a model predicts given tokens: log-likelihood and best guess at every position.

B rows, L tokens of a row, D d_model, V vocab.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.transformer import Preference, Transformer, Variables, hidden_states, output_weights

Progress = Callable[[int], None]
"""Called with the number of rows scored so far."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of a document's tokens after its first, all [n - 1]."""

    nats: np.ndarray
    """-log p(token | the tokens before it in its window), float32."""
    best_ids: np.ndarray
    """The most likely token in its place, int32."""


@dataclass(frozen=True)
class _Row:
    """A window of one document, and which of its targets are scored here."""

    document: int
    start: int
    first: int
    """Targets before this place of the row are context only."""


def score_documents(
    model: Transformer,
    variables: Variables,
    documents: list[np.ndarray],
    *,
    length: int,
    batch_size: int,
    progress: Progress = lambda _: None,
    preference: Preference | None = None,
) -> list[TokenScores]:
    """Scores every token of every document but its first.

    A document longer than `length` is read in windows that move by half a window, so that each
    token but the first half window's is predicted from at least length / 2 tokens before it.

    Args:
      documents: int32 [n] each, n >= 2, beginning with the end-of-text token.
      length: tokens of a window; the model's context_length at most.
      batch_size: windows scored at once; the last batch is padded.
      preference: the experts that every document would rather have, its dim B of size 1.
    Returns:
      One TokenScores per document, in order.
    """
    rows = [row for i, tokens in enumerate(documents) for row in _rows(i, len(tokens), length)]
    scores = [
        TokenScores(np.zeros(len(t) - 1, np.float32), np.zeros(len(t) - 1, np.int32))
        for t in documents
    ]
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        windows = _windows(batch, documents, length, batch_size)
        nats_BL, best_BL = jax.device_get(_score_rows(model, variables, *windows, preference))
        for row, nats_L, best_L in zip(batch, nats_BL, best_BL, strict=False):
            count = min(length, len(documents[row.document]) - 1 - row.start)
            scored = slice(row.start + row.first, row.start + count)
            scores[row.document].nats[scored] = nats_L[row.first : count]
            scores[row.document].best_ids[scored] = best_L[row.first : count]
        progress(min(begin + batch_size, len(rows)))
    return scores


def num_rows(lengths: Iterable[int], length: int) -> int:
    """Windows that documents of these lengths take: the total for a progress bar."""
    return sum(len(_rows(0, n, length)) for n in lengths)


def _rows(document: int, num_tokens: int, length: int) -> list[_Row]:
    """Windows over num_tokens - 1 inputs; each scores what the ones before it have not."""
    stride = max(length // 2, 1)
    rows = [_Row(document, 0, 0)]
    while rows[-1].start + length < num_tokens - 1:
        rows.append(_Row(document, rows[-1].start + stride, length - stride))
    return rows


def _windows(rows, documents, length, batch_size):
    """Tokens, positions and targets [B, L] of the rows; padding has position -1."""
    tokens_BL = np.zeros((batch_size, length), np.int32)
    positions_BL = np.full((batch_size, length), -1, np.int32)
    targets_BL = np.zeros((batch_size, length), np.int32)
    for i, row in enumerate(rows):
        window = documents[row.document][row.start : row.start + length + 1]
        count = len(window) - 1
        tokens_BL[i, :count], targets_BL[i, :count] = window[:-1], window[1:]
        positions_BL[i, :count] = np.arange(count)
    return tokens_BL, positions_BL, targets_BL


@partial(jax.jit, static_argnums=0)
def _score_rows(model, variables, tokens_BL, positions_BL, targets_BL, preference):
    """-log p(target) and the best token at each place, [B, L]; logits are made a row at a time."""
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL, preference=preference)
    w_DV = output_weights(model, variables)

    def one_row(row):
        hidden_LD, targets_L = row
        logits_LV = jnp.einsum("LD,DV->LV", hidden_LD, w_DV, preferred_element_type=jnp.float32)
        target_L = jnp.take_along_axis(logits_LV, targets_L[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_LV, axis=1) - target_L, jnp.argmax(logits_LV, axis=1)

    return jax.lax.map(one_row, (hidden_BLD, targets_BL))
