"""Rows that the student writes itself (on-policy distillation; GKD, Agarwal et al. 2023).

A share of each batch's rows keeps its first tokens and is written on by the student as it is; the
teacher marks what it wrote, token by token. The gradient does not pass through the choice of the
tokens: it is that of the divergence at the places that the student comes to.

B rows, L length, W rows that are written, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from configs.base import RunConfig
from configs.checks import require
from configs.feed_forward import MoEConfig
from model.step import OWN_CHOICE
from model.transformer import Variables
from train.loop import to_devices
from train.state import TrainState

Batch = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """What the student wrote after each prompt."""

    tokens: list[list[int]]
    """New tokens of each prompt; fewer than asked for where a text ended."""
    chosen: dict[str, np.ndarray] | None
    """The experts of each token that was read, prompt and text: by MoE layer of the pattern, int32
    [W, periods, L, K], OWN_CHOICE behind a text's end; None of a model without experts."""


class Write(Protocol):
    """Writes on after each prompt, with weights as they are at that step."""

    def __call__(
        self,
        variables: Variables,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> Written: ...


MakeWriter = Callable[[Mesh], Write]
"""Of the run's mesh; given by the scripts, since training knows no engine."""


def with_written_rows(
    run: RunConfig, mesh: Mesh, make_writer: MakeWriter | None
) -> Callable[[Batch, TrainState, int], Batch]:
    """A function that has the student write a share of a batch's rows, which it adds "is_data" and,
    with replay, "chosen" to.

    Which rows, and with which draws, follows from the run's seed and the step alone: a resumed run
    writes the same.

    Raises:
      UserError: settings that the run's rows or model can't follow, or nothing that writes.
    """
    _check(run)
    assert run.distill is not None
    require(
        make_writer is not None,
        "distill.on_policy needs the engine, which training does not know: use scripts.distill",
    )
    assert make_writer is not None
    config, write = run.distill.on_policy, make_writer(mesh)
    has_experts = any(isinstance(spec.ffn, MoEConfig) for spec in run.model.pattern)

    def transform(batch: Batch, state: TrainState, done: int) -> Batch:
        random = np.random.default_rng((run.seed, done))
        size = run.batch_size
        count = int(config.share * size + random.random())  # the share, on average over steps
        host = {name: np.array(batch[name]) for name in ("tokens", "targets", "positions")}
        rows_W = np.sort(random.permutation(size)[: min(count, size)])
        seeds = random.integers(0, 2**62, size=len(rows_W)).tolist()
        prompts, chosen = [_prompt(host, row, run) for row in rows_W], None
        if prompts:
            written = write(
                state.variables,
                prompts,
                max_new_tokens=max(_room(run) - max(map(len, prompts)), 1),
                temperature=config.temperature,
                seeds=seeds,
            )
            for row, prompt, tokens in zip(rows_W, prompts, written.tokens, strict=True):
                _put(host, row, prompt, tokens)
            chosen = written.chosen
        is_data_BL = np.ones(host["tokens"].shape, bool)
        is_data_BL[rows_W] = False
        added: Batch = {**host, "is_data": is_data_BL}
        if has_experts:
            added["chosen"] = _of_batch(chosen, rows_W, run)
        return {**batch, **to_devices(added, mesh)}

    return transform


PROMPT_LENGTH = 32


def _check(run: RunConfig) -> None:
    assert run.distill is not None
    prompt_length, length = run.distill.on_policy.prompt_length, run.data.seq_len
    is_chat = run.data.form == "chat"
    require(
        not is_chat or prompt_length is None,
        f"distill.on_policy.prompt_length={prompt_length} has no effect on chats, whose prompt "
        "ends where the first answer begins: leave it out",
    )
    require(
        is_chat or (prompt_length or PROMPT_LENGTH) <= length,
        f"distill.on_policy.prompt_length={prompt_length or PROMPT_LENGTH} must be at most "
        f"data.seq_len={length}: the rest of the row is for the student to write",
    )
    require(
        run.model.context_length > length,
        f"distill.on_policy writes data.seq_len={length} tokens and their last target, more than "
        f"model.context_length={run.model.context_length}: shorten data.seq_len by one",
    )
    require(
        all(spec.depth is None for spec in run.model.layer_kinds),
        "distill.on_policy replays the experts of every token, and Mixture-of-Depths layers work "
        "on chosen tokens alone: leave it out for this model",
    )


def _room(run: RunConfig) -> int:
    """Tokens of a written sequence at most: a row and its last target."""
    return run.data.seq_len + 1


def _prompt(host: dict[str, np.ndarray], row: int, run: RunConfig) -> list[int]:
    """What the student goes on from."""
    assert run.distill is not None
    if run.data.form == "chat":
        end = int(np.argmax(host["targets"][row] >= 0)) + 1
    else:
        end = run.distill.on_policy.prompt_length or PROMPT_LENGTH
    begin = end - 1 - max(int(host["positions"][row, end - 1]), 0)
    return host["tokens"][row, begin:end].tolist()


def _put(host: dict[str, np.ndarray], row: int, prompt: list[int], tokens: list[int]) -> None:
    """Writes prompt and text into a row, the targets of the text alone; the rest is padding."""
    text = [*prompt, *tokens]
    length = host["tokens"].shape[1]
    read = min(len(text), length)
    host["tokens"][row], host["targets"][row], host["positions"][row] = 0, -1, -1
    host["tokens"][row, :read] = text[:read]
    host["positions"][row, :read] = np.arange(read)
    begin = len(prompt) - 1
    host["targets"][row, begin : len(text) - 1] = tokens


def _of_batch(chosen: dict[str, np.ndarray] | None, rows_W: np.ndarray, run: RunConfig) -> Any:
    """The experts given to each token of a batch, by layer int32 [B, periods, L, K]: those of the
    rows that were written, the router's own choice in others."""
    found = {}
    for i, spec in enumerate(run.model.pattern):
        if not isinstance(spec.ffn, MoEConfig):
            continue
        shape = (run.model.num_periods, run.data.seq_len, spec.ffn.router.top_k)
        given = np.full((run.batch_size, *shape), OWN_CHOICE, np.int32)
        if chosen is not None:
            given[rows_W] = chosen[f"layer_{i}"]
        found[f"layer_{i}"] = given
    return found
