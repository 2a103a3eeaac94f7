"""Scoring of given tokens: log-likelihood and best guess at every position.

A model with memory reads each document segment by segment and keeps what it has seen; others read
overlapping windows.

B rows, L tokens of a row, D d_model, V vocab.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.layers import unembed
from model.model_state import init_memory
from model.transformer import Preference, Transformer, Variables, hidden_states, output_weights

Progress = Callable[[int], None]
"""Called with the number of rows scored so far."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of a document's tokens after its first, all [n - 1]."""

    nats: np.ndarray
    """-log p(token | the tokens before it in its window or memory), float32."""
    best_ids: np.ndarray
    """The most likely token in its place, int32."""


@dataclass(frozen=True)
class _Row:
    """A window or segment of one document, and which of its targets are scored here."""

    document: int
    start: int
    first: int
    """Targets before this place of the row are context only."""
    position: int
    """Of its first token: a window counts from 0, a segment goes on from the one before."""


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

    Without memory, a document longer than `length` is read in windows that move by half a window,
    so that each token but the first half window's is predicted from at least length / 2 tokens
    before it. With memory, segments of `length` follow each other, and each token is predicted from
    everything the model reaches.

    Args:
      documents: int32 [n] each, n >= 2, beginning with the end-of-text token.
      length: tokens of a window or segment; the model's context_length at most.
      batch_size: windows or segments scored at once; what is left of a batch is padded.
      preference: the experts that every document would rather have, its dim B of size 1.
    Returns:
      One TokenScores per document, in order.
    """
    has_memory = model.config.memory_length is not None
    rows = [_rows(i, len(tokens), length, has_memory) for i, tokens in enumerate(documents)]
    scores = [
        TokenScores(np.zeros(len(t) - 1, np.float32), np.zeros(len(t) - 1, np.int32))
        for t in documents
    ]
    memory, done = init_memory(model.config, batch_size, model.execution.compute_dtype), 0
    for batch in (_streams if has_memory else _batches)(rows, batch_size):
        windows = _windows(batch, documents, length, batch_size)
        scored, memory = _score_rows(model, variables, *windows, memory, preference)
        for row, nats_L, best_L in zip(batch, *jax.device_get(scored), strict=False):
            if row is None:
                continue
            count = min(length, len(documents[row.document]) - 1 - row.start)
            places = slice(row.start + row.first, row.start + count)
            scores[row.document].nats[places] = nats_L[row.first : count]
            scores[row.document].best_ids[places] = best_L[row.first : count]
            done += 1
        progress(done)
    return scores


def num_rows(lengths: Iterable[int], length: int, *, has_memory: bool = False) -> int:
    """Windows (or, with memory, segments) that documents of these lengths take: the total for a
    progress bar.
    """
    return sum(len(_rows(0, n, length, has_memory)) for n in lengths)


def _rows(document: int, num_tokens: int, length: int, has_memory: bool) -> list[_Row]:
    """Rows over num_tokens - 1 inputs; each scores what the ones before it have not."""
    if has_memory:
        return [_Row(document, start, 0, start) for start in range(0, num_tokens - 1, length)]
    stride = max(length // 2, 1)
    rows = [_Row(document, 0, 0, 0)]
    while rows[-1].start + length < num_tokens - 1:
        rows.append(_Row(document, rows[-1].start + stride, length - stride, 0))
    return rows


def _batches(rows: list[list[_Row]], batch_size: int) -> Iterator[list[_Row | None]]:
    """All documents' windows in batches; the last one may be shorter."""
    flat = [row for document in rows for row in document]
    for begin in range(0, len(flat), batch_size):
        yield [*flat[begin : begin + batch_size]]


def _streams(rows: list[list[_Row]], batch_size: int) -> Iterator[list[_Row | None]]:
    """Batches in which a document's segments come one after the other at one place.

    A place whose document has ended takes the longest that waits, so that none is left for last;
    its first position, 0, cuts it off from what the memory holds. None is a place without work.
    """
    waiting = deque(sorted(rows, key=len, reverse=True))
    places: list[deque[_Row]] = [deque() for _ in range(batch_size)]
    while waiting or any(places):
        for place in places:
            if not place and waiting:
                place.extend(waiting.popleft())
        yield [place.popleft() if place else None for place in places]


def _windows(rows, documents, length, batch_size):
    """Tokens, positions and targets [B, L] of the rows; padding has position -1."""
    tokens_BL = np.zeros((batch_size, length), np.int32)
    positions_BL = np.full((batch_size, length), -1, np.int32)
    targets_BL = np.zeros((batch_size, length), np.int32)
    for i, row in enumerate(rows):
        if row is None:
            continue
        window = documents[row.document][row.start : row.start + length + 1]
        count = len(window) - 1
        tokens_BL[i, :count], targets_BL[i, :count] = window[:-1], window[1:]
        positions_BL[i, :count] = row.position + np.arange(count)
    return tokens_BL, positions_BL, targets_BL


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _score_rows(model, variables, tokens_BL, positions_BL, targets_BL, memory, preference):
    """`nats_and_best` of the rows, and the memory after them."""
    hidden_BLD, memory = hidden_states(
        model, variables, tokens_BL, positions_BL, memory, preference
    )
    scored = nats_and_best(hidden_BLD, output_weights(model, variables, as_stored=True), targets_BL)
    return scored, memory


def nats_and_best(
    hidden_BLD: jax.Array, w_DV: Any, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and the best token at each place, [B, L]; logits are made a row at a time."""

    def one_row(row):
        hidden_LD, targets_L = row
        logits_LV = unembed(hidden_LD, w_DV)
        target_L = jnp.take_along_axis(logits_LV, targets_L[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_LV, axis=1) - target_L, jnp.argmax(logits_LV, axis=1)

    return jax.lax.map(one_row, (hidden_BLD, targets_BL))
