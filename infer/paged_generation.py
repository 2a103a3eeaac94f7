"""Generation by a model whose experts are paged: one text at a time, token by token."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from configs.checks import require, require_seed
from infer.engine.answering import take
from infer.engine.sampler import Sampler
from infer.engine.sequence import TokenSequence
from infer.engine.types import Request
from infer.expert_paging import PagedModel
from infer.generation import Generation, OnTokens, Timings
from infer.sampling import Sampling


def generate_paged(
    paged: PagedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: frozenset[int] = frozenset(),
    is_stopped: Callable[[list[int]], bool] | None = None,
    on_tokens: OnTokens = lambda _: None,
) -> Generation:
    """Continues a prompt until a stop token or max_new_tokens; arguments as infer.generate's.

    Raises:
      UserError: an empty prompt, tokens outside the vocabulary, more tokens than the context.
    """
    config, began = paged.model.config, time.monotonic()
    length = len(prompt) + max_new_tokens
    require(len(prompt) > 0, "the prompt is empty: it needs at least one token")
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    require(
        min(prompt) >= 0 and max(prompt) < config.vocab_size,
        f"the prompt has tokens outside [0, {config.vocab_size})",
    )
    require(
        length <= config.context_length,
        f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than the model's "
        f"context_length={config.context_length}: shorten one of them",
    )
    require_seed(sampling.seed)
    request = Request(
        prompt, max_new_tokens, sampling=sampling, stop_ids=stop_ids, is_stopped=is_stopped
    )
    sequence = TokenSequence(0, request, paged.width, b"", row=0)
    sampler, timings = Sampler(1, config.vocab_size), Timings()
    sampler.place(0, sampling)
    sampler.begin(sequence)
    state = paged.new_state(length)
    logits_RV = None
    for begin in range(0, len(prompt), paged.width):
        piece = list(prompt[begin : begin + paged.width])
        logits_RV, state = paged.read(piece, begin, state)
    assert logits_RV is not None
    while True:
        at = time.monotonic()
        position_R = np.array([sequence.known - 1], np.int32)
        taken = take(sequence, [sampler.choose(logits_RV, [sequence], position_R)[sequence]])
        require(taken.error is None, taken.error or "")
        if not timings.first_token_seconds:
            timings.first_token_seconds = time.monotonic() - began
        if taken.tokens:
            on_tokens(np.array(taken.tokens, np.int32))
        if taken.reason is not None:
            return timings.generation([sequence.text], has_draft=False)
        newest = sequence.text[-1]
        logits_RV, state = paged.read([newest], sequence.known - 1, state)
        logits_RV.block_until_ready()
        timings.add(time.monotonic() - at, 1, np.ones(1, int), None)
