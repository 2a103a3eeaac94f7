"""Generation of given prompts: the engine with requests that are all there at the beginning.

B prompts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.checks import UserError, require_seed
from infer.engine import Engine, EngineOptions, Request
from infer.engine.programs import Programs
from infer.generation import Generation, OnTokens
from infer.model_draft import ModelDraft
from infer.mtp_draft import MtpDraft
from infer.ngram_draft import NgramDraft
from infer.sampling import Sampling
from infer.self_speculative import Draft
from model.step import Preference
from model.transformer import Transformer, Variables

MOST_ROWS = 32
"""Sequences at once, where the caller does not say how many."""


def generate(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    stop_ids: frozenset[int] = frozenset(),
    is_stopped: Callable[[list[int]], bool] | None = None,
    on_tokens: OnTokens = lambda _: None,
    exit_threshold: float | None = None,
    draft: Draft | NgramDraft | ModelDraft | MtpDraft | None = None,
    preference: Preference | None = None,
    kv_dtype: str | None = None,
    num_pages: int | None = None,
    rows: int | None = None,
    piece: int = EngineOptions.piece,
    mesh: Mesh | None = None,
    programs: Programs | None = None,
) -> Generation:
    """Continues each prompt until a stop token or max_new_tokens.

    Args:
      prompts: token lists, each beginning with the end-of-text token; lengths may differ.
      sampling: of all prompts, or one for each.
      is_stopped: see Request.
      exit_threshold, draft, kv_dtype, num_pages, piece: see EngineOptions.
      preference: the experts that the prompts would rather have, a row each or one for all.
      rows: sequences at once; with the same number a prompt's text is the same bit for bit, alone
        or among others. None: as many as there are prompts, MOST_ROWS at most.
      mesh: where the variables lie; None is one device.
      programs: see Engine.
    Raises:
      UserError: an empty prompt, a token outside the vocabulary, more tokens than the context, or
        options that can't go together.
    """
    if not len(prompts):
        raise UserError("there are no prompts: give at least one")
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(prompts):
        raise UserError(f"{len(each)} samplings for {len(prompts)} prompts: give one, or one each")
    for setting in each:
        require_seed(setting.seed)
    longest = max(map(len, prompts))
    options = EngineOptions(
        max_rows=rows or min(len(prompts), MOST_ROWS),
        max_length=max(longest + max_new_tokens, 1),
        max_prompt=longest or None,
        piece=piece,
        kv_dtype=kv_dtype,
        num_pages=num_pages,
        exit_threshold=exit_threshold,
        draft=draft,
    )
    requests = [
        Request(
            prompt,
            max_new_tokens,
            sampling=each[i],
            stop_ids=stop_ids,
            is_stopped=is_stopped,
            preference=_row_of(preference, i),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = Engine(model, variables, options, mesh=mesh, programs=programs)
    for request in requests:
        engine.add(request)
    texts: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        new: dict[int, list[int]] = {}
        for emitted in engine.step():
            new.setdefault(emitted.request, []).extend(emitted.tokens)
        for place in range(max(map(len, new.values()), default=0)):
            new_B = np.full(len(prompts), -1, np.int32)
            for number, tokens in new.items():
                if place < len(tokens):
                    new_B[number] = tokens[place]
                    texts[number].append(tokens[place])
            on_tokens(new_B)
    return engine.timings.generation(texts, has_draft=draft is not None)


def _row_of(preference: Preference | None, row: int) -> Any:
    if preference is None:
        return None
    return jax.tree.map(lambda x: x[:, min(row, x.shape[1] - 1)][:, None], preference)
