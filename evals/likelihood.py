"""Log-likelihoods of continuations given contexts, batched by length.

Text becomes tokens as in lm-evaluation-harness, so that scores compare: blanks at a context's end
belong to the continuation, context and continuation are encoded together, and what follows the
context's own tokens is the continuation. Continuations of one context, a question's choices, read
it once where that saves work: the context's state is copied for each.

B rows, L tokens of a row, G contexts, P tokens of a context, T scored tokens, D d_model, V vocab.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import UserError, require, require_text
from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.tokenizer import end_of_text_id
from evals.samples import Likelihood
from model.layers import unembed
from model.model_state import init_memory, init_state, take_rows, unmixable_reason
from model.step import make_step
from model.transformer import Transformer, Variables, forward, hidden_states, output_weights

CHUNK = 64
"""Scored tokens whose logits are there at once."""
SHORTEST = 16
"""Tokens that a row is padded to at least; longer ones to 1, 1.5, 2, 3, 4, 6, ... times it."""
MIN_SAVING = 1.3
"""Contexts are read once for all their continuations where that leaves this much less to read: two
programs and copies of states take time, too."""
TEXTS_IN_ROW = 4
"""Of the longest ones of a batch: shorter rows end less equally, longer ones are fewer to share
out among devices."""
LEFT_FREE = 16
"""One part of so many of a full batch."""


@dataclass(frozen=True)
class Pair:
    """A context and its continuation in tokens."""

    tokens: tuple[int, ...]
    """What the model reads: both, less the last token, which is only predicted."""
    targets: tuple[int, ...]
    """The continuation; the last ones predicted. Empty is a continuation without tokens."""
    num_dropped: int = 0

    @property
    def begin(self) -> int:
        """Place of the first target: as many tokens are the context."""
        return len(self.tokens) + 1 - len(self.targets)


@dataclass(frozen=True)
class _Shared:
    """Pairs that begin with the same tokens: indices, and how many tokens they share."""

    members: tuple[int, ...]
    length: int


def first_id(tokenizer: PublicTokenizer) -> int:
    """The token that an empty context stands for: the one that begins a text, or that ends one.

    Raises:
      UserError: the tokenizer has neither.
    """
    found = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    found = min(tokenizer.eos_ids, default=None) if found is None else found
    if found is not None:
        return found
    try:
        return end_of_text_id(tokenizer.tokenizer)
    except UserError as error:
        raise UserError(
            "the tokenizer has no token that begins or ends a text, which an empty context needs: "
            "give every sample a context, or name a bos_token in its tokenizer_config.json"
        ) from error


def encode_pair(
    tokenizer: PublicTokenizer, context: str, continuation: str, max_length: int
) -> Pair:
    """The tokens of both, cut on the left to what the model reads at once.

    Raises:
      UserError: a continuation longer than the model's context, or text that is no UTF-8.
    """
    require_text(context + continuation, "a sample")
    if not continuation:
        return Pair((), ())
    if context:
        kept = context.rstrip()
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(kept)
        begin = len(before)
        if len(whole) <= begin:  # the continuation's tokens are the context's last one, too
            same = (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b)
            begin = next(same, len(whole) - 1)
    else:
        whole, begin = tokenizer.encode(continuation, bos=False), 0
    if begin == 0 and (context or whole[0] != first_id(tokenizer)):
        whole = [first_id(tokenizer), *whole]
    begin = max(begin, 1)
    require(
        len(whole) - begin <= max_length,
        f"a continuation has {len(whole) - begin} tokens, the model reads {max_length} at once: "
        "leave the sample out (--limit), or take a model with a longer context",
    )
    dropped = max(len(whole) - 1 - max_length, 0)
    return Pair(tuple(whole[dropped:-1]), tuple(whole[begin:]), dropped)


def score_pairs(
    model: Transformer,
    variables: Variables,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    on_answer: Callable[[int, Likelihood], None] = lambda i, found: None,
    share_contexts: bool = True,
) -> list[Likelihood]:
    """The likelihood of each pair's targets, in order, whatever the batches.

    Args:
      batch_tokens: tokens that a batch reads, more or less; the logits of CHUNK are there at once.
      on_answer: called with each pair's index and likelihood as soon as it is there.
      share_contexts: whether continuations of one context may read it once.
    """
    found: dict[int, Likelihood] = {}

    def take(i: int, nats: float, is_greedy: bool) -> None:
        found[i] = Likelihood(nats, is_greedy, len(pairs[i].targets), pairs[i].num_dropped)
        on_answer(i, found[i])

    for i, pair in enumerate(pairs):
        if not pair.targets:
            take(i, 0.0, True)
    rest = [i for i, pair in enumerate(pairs) if pair.targets]
    shared, alone = [], rest
    if share_contexts and model.config.memory_length is None:
        shared, alone = _share(pairs, rest)
    for members, made in itertools.chain(
        _scored_shared(model, variables, pairs, shared, batch_tokens),
        _scored_alone(model, variables, pairs, alone, batch_tokens),
    ):
        nats_T, is_best_T = jax.device_get(made)
        at = 0
        for i in members:
            own = slice(at, at + len(pairs[i].targets))
            take(i, -float(nats_T[own].sum(dtype=np.float64)), bool(is_best_T[own].all()))
            at = own.stop
    return [found[i] for i in range(len(pairs))]


_Scored = Iterator[tuple[list[int], Any]]
"""Indices of pairs, and -log p and whether it is the most likely one of their targets, [T]."""


def _share(pairs: Sequence[Pair], indices: Sequence[int]) -> tuple[list[_Shared], list[int]]:
    """Pairs whose contexts are read once, and the others."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        context = pairs[i].tokens[: pairs[i].begin]
        by_context.setdefault(context, []).append(i)
    shared, alone = [], []
    for context, members in by_context.items():
        distinct = {pairs[i].tokens for i in members}
        whole = sum(map(len, distinct))
        left = whole - (len(context) - 1) * (len(distinct) - 1)
        if whole < MIN_SAVING * left:
            alone += members
        else:
            shared.append(_Shared(tuple(members), len(context)))
    return shared, alone


def _scored_alone(
    model: Transformer,
    variables: Variables,
    pairs: Sequence[Pair],
    indices: Sequence[int],
    batch_tokens: int,
) -> _Scored:
    """Whole pairs, several in a row as documents are in training; pairs that read the same tokens
    read them once. A memory goes through a whole row: with one, each has a row to itself."""
    members: dict[_Text, list[int]] = {}
    for i in indices:
        members.setdefault(pairs[i].tokens, []).append(i)
    is_mixed = model.config.memory_length is None
    for rows in _row_batches(list(members), batch_tokens, is_mixed=is_mixed):
        length = whole_step(max(sum(map(len, row)) for row in rows))
        tokens_BL, positions_BL = _padded(rows, [[0] * len(row) for row in rows], length)
        wanted = []
        for b, row in enumerate(rows):
            begins = itertools.accumulate(map(len, row), initial=0)
            for text, begin in zip(row, begins, strict=False):
                wanted += [(b, begin + pairs[i].begin, i) for i in members[text]]
        places = _places(pairs, wanted)
        yield (
            [i for _, _, i in wanted],
            _score_rows(model, variables, tokens_BL, positions_BL, *places),
        )


_Text = tuple[int, ...]
"""Tokens of a pair."""


def _row_batches(
    texts: Sequence[_Text], batch_tokens: int, *, is_mixed: bool
) -> Iterator[list[list[_Text]]]:
    """Batches of rows, a power of two of them and about equally long; the longest texts first.

    Args:
      is_mixed: whether a row may hold several texts: if not, those of a batch are of about one
        length.
    """
    # Rows don't end at one place: with a part left free, full batches have one shape all the same.
    most, size = batch_tokens - batch_tokens // LEFT_FREE, 0
    batch: list[_Text] = []
    for text in sorted(texts, key=len, reverse=True):
        is_other = not is_mixed and bucket(len(text)) < bucket(len(batch[0] if batch else text))
        if batch and (is_other or size + len(text) > most):
            yield _rows_of(batch, is_mixed=is_mixed)
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield _rows_of(batch, is_mixed=is_mixed)


def _rows_of(texts: Sequence[_Text], *, is_mixed: bool) -> list[list[_Text]]:
    """Each text, from the longest on, in the row that is shortest then."""
    if not is_mixed:
        return [[text] for text in texts]
    count = floor_power(sum(map(len, texts)) // (TEXTS_IN_ROW * len(texts[0])))
    rows: list[list[_Text]] = [[] for _ in range(count)]
    shortest = [(0, b) for b in range(count)]
    for text in texts:
        size, b = heapq.heappop(shortest)
        rows[b].append(text)
        heapq.heappush(shortest, (size + len(text), b))
    return rows


def _scored_shared(
    model: Transformer,
    variables: Variables,
    pairs: Sequence[Pair],
    groups: Sequence[_Shared],
    batch_tokens: int,
) -> _Scored:
    """Contexts, then their continuations from copies of the contexts' state.

    The context's last token is read with each continuation: it predicts the first target.
    """
    is_mixed = unmixable_reason(model.config) is None
    for batch in _group_batches(pairs, groups, batch_tokens, is_mixed=is_mixed):
        members = [i for group in batch for i in group.members]
        context_of = [g for g, group in enumerate(batch) for _ in group.members]
        splits = [batch[g].length - 1 for g in context_of]
        contexts = [pairs[group.members[0]].tokens[: group.length - 1] for group in batch]
        rows = [pairs[i].tokens[split:] for i, split in zip(members, splits, strict=True)]
        read, _ = _laid_out(contexts, [0] * len(contexts), is_mixed=is_mixed)
        went_on, begins = _laid_out(rows, splits, is_mixed=is_mixed)
        context_R = np.zeros(power(len(rows)), np.int32)
        context_R[: len(rows)] = context_of
        longest = bucket(max(map(len, contexts))), bucket(max(map(len, rows)), 4)
        wanted = [
            (b, at + pairs[i].begin - split, i)
            for (b, at), i, split in zip(begins, members, splits, strict=True)
        ]
        places = _places(pairs, wanted)
        shape = (power(len(contexts)), *longest)
        yield (
            members,
            _score_shared(model, shape, variables, read, context_R, went_on, *places),
        )


def _group_batches(
    pairs: Sequence[Pair], groups: Sequence[_Shared], batch_tokens: int, *, is_mixed: bool
) -> Iterator[list[_Shared]]:
    """Groups that are read together, those with the longest contexts first.

    Args:
      is_mixed: whether they share one row; if not, rows of a batch are of about one length.
    """

    def shape(group: _Shared) -> tuple[int, int]:
        most = max(len(pairs[i].targets) for i in group.members)
        return bucket(group.length - 1), bucket(most, 4)

    batch: list[_Shared] = []
    read = rows = 0
    for group in sorted(groups, key=shape, reverse=True):
        size = group.length - 1 + sum(len(pairs[i].targets) for i in group.members)
        is_other = bool(batch) and not is_mixed and shape(group) != shape(batch[0])
        # Copies of a context take memory, not time: four times as many tokens as are read.
        kept = (rows + len(group.members)) * sum(shape(batch[0] if batch else group))
        if batch and (is_other or read + size > batch_tokens or kept > 4 * batch_tokens):
            yield batch
            batch, read, rows = [], 0, 0
        batch.append(group)
        read += size
        rows += len(group.members)
    if batch:
        yield batch


_Laid = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Tokens, positions and each token's row of the state, int32 [B, L]; None: row b's is b."""


def _laid_out(
    pieces: Sequence[_Text], starts: Sequence[int], *, is_mixed: bool
) -> tuple[_Laid, list[tuple[int, int]]]:
    """Pieces of sequences in one row, or each in a row of its own; and where each begins.

    Args:
      starts: the position of each piece's first token.
    """
    if not is_mixed:
        length = bucket(max(map(len, pieces)), 4)
        tokens_BL, positions_BL = _padded(
            [[piece] for piece in pieces], [[start] for start in starts], length
        )
        return (tokens_BL, positions_BL, None), [(b, 0) for b in range(len(pieces))]
    ends = [*itertools.accumulate(map(len, pieces), initial=0)]
    tokens_BL, positions_BL = _padded([pieces], [starts], bucket(ends[-1]))
    rows_BL = np.zeros_like(tokens_BL)
    rows_BL[0, : ends[-1]] = np.repeat(np.arange(len(pieces)), [*map(len, pieces)])
    return (tokens_BL, positions_BL, rows_BL), [(0, at) for at in ends[:-1]]


def _padded(
    rows: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[Sequence[int]],
    length: int,
    num_rows: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions, int32 [B, L]; padding has position -1.

    Args:
      rows: pieces of each row, one after the other.
      starts: the position of each piece's first token.
      num_rows: B; None is a power of two.
    """
    count = power(len(rows)) if num_rows is None else num_rows
    tokens_BL = np.zeros((count, length), np.int32)
    positions_BL = np.full((count, length), -1, np.int32)
    for b, (row, begun) in enumerate(zip(rows, starts, strict=True)):
        at = 0
        for piece, start in zip(row, begun, strict=True):
            own = slice(at, at + len(piece))
            tokens_BL[b, own] = piece
            positions_BL[b, own] = start + np.arange(len(piece))
            at = own.stop
    return tokens_BL, positions_BL


def _places(
    pairs: Sequence[Pair], wanted: Sequence[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, place in it and token of each target, int32 [T], padded.

    Args:
      wanted: row, place of the pair's first target in what the model reads, and index of the pair.
    """
    found = [
        (row, first - 1 + k, target)
        for row, first, i in wanted
        for k, target in enumerate(pairs[i].targets)
    ]
    count = CHUNK if len(found) <= CHUNK else bucket(len(found), 2 * CHUNK)
    padded = np.zeros((3, count), np.int32)
    padded[:, : len(found)] = np.array(found).T
    return padded[0], padded[1], padded[2]


@partial(jax.jit, static_argnums=0)
def _score_rows(model, variables, tokens_BL, positions_BL, row_T, place_T, target_T):
    """-log p of the targets and whether each is the most likely token, [T]."""
    memory = init_memory(model.config, len(tokens_BL), model.execution.compute_dtype)
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL, memory)
    return _score_places(model, variables, hidden_BLD[row_T, place_T], target_T)


@partial(jax.jit, static_argnums=(0, 1))
def _score_shared(model, shape, variables, read, context_R, went_on, row_T, place_T, target_T):
    """As `_score_rows`, of rows that go on from contexts.

    Args:
      shape: how many contexts, and the tokens of a context and of a continuation at most.
      context_R: the context of each row of the state.
    """
    num_contexts, context, length = shape
    dtype = model.execution.compute_dtype
    spare = length - 1  # a window's slots come round only after a whole piece
    state = init_state(model.config, num_contexts, context + length, dtype, spare)
    tokens_BL, positions_BL, rows_BL = read
    step = make_step(tokens_BL, positions_BL, rows_BL=rows_BL, is_whole=True)
    _, state = forward(model, variables, step, state)
    assert state is not None
    tokens_BL, positions_BL, rows_BL = went_on
    step = make_step(tokens_BL, positions_BL, rows_BL=rows_BL)
    hidden_BLD, _ = forward(model, variables, step, take_rows(state, context_R))
    return _score_places(model, variables, hidden_BLD[row_T, place_T], target_T)


def _score_places(model, variables, hidden_TD, target_T):
    """Log-softmax in float32, CHUNK tokens at a time."""
    w_DV = output_weights(model, variables, as_stored=True)

    def one_chunk(chunk):
        hidden_CD, target_C = chunk
        logits_CV = unembed(hidden_CD, w_DV)
        target = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        nats_C = jax.nn.logsumexp(logits_CV, axis=1) - target
        return nats_C, jnp.argmax(logits_CV, axis=1) == target_C

    chunks = (hidden_TD.reshape(-1, CHUNK, hidden_TD.shape[1]), target_T.reshape(-1, CHUNK))
    nats, is_best = jax.lax.map(one_chunk, chunks)
    return nats.reshape(-1), is_best.reshape(-1)


def bucket(count: int, shortest: int = SHORTEST) -> int:
    """1, 1.5, 2, 3, 4, 6, ... times the shortest: few lengths, and at most a third of padding."""
    size = shortest
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def floor_power(count: int) -> int:
    """The power of two before it, or it; at least 1."""
    return 1 << (max(count, 1).bit_length() - 1)


def whole_step(count: int) -> int:
    """The next multiple of a sixteenth of the power of two at or above it: at most an eighth of
    padding."""
    step = max(power(count) // 16, 8)
    return -(-count // step) * step
