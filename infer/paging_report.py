"""What paging would bring: policies beside Belady's rule, on the routing that a model recorded."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from rich.table import Table

from configs.checks import require
from infer import steps
from infer.engine.paged import PagedPrograms
from infer.expert_cache import POLICIES, PagingCounts, belady, simulate
from infer.expert_paging import PagedLayer, PagedModel
from infer.expert_store import Paging
from infer.steps import StateSize


@dataclass(frozen=True)
class Found:
    """One policy with one share of the experts resident."""

    share: float
    num_slots: int
    """Of the first layer with experts."""
    policy: str
    counts: PagingCounts

    def as_tree(self) -> dict[str, Any]:
        names = ("hit_rate", "ready_rate", "accuracy")
        return dataclasses.asdict(self) | {name: getattr(self.counts, name) for name in names}


def record(paged: PagedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Reads a prompt and writes `count` tokens, the likeliest each, one token at a time: what it
    asks for then has room wherever a token's experts have. Returns the text.

    Args:
      paged: one that records.
    Raises:
      UserError: an empty prompt, no tokens to write, more tokens than the context.
    """
    config, length = paged.model.config, len(prompt) + count
    require(len(prompt) > 0, "the prompt is empty: it needs at least one token")
    require(count >= 1, f"max_new_tokens={count} must be at least 1")
    require(
        length <= config.context_length,
        f"a prompt of {len(prompt)} tokens and {count} new ones are more than the model's "
        f"context_length={config.context_length}: shorten one of them",
    )
    programs, tokens = PagedPrograms(paged), list(prompt)
    size = StateSize(1, length, paged.model.execution.compute_dtype)
    state = steps.empty_state(paged.model, size)
    for place in range(length - 1):
        at = np.array([tokens[place]], np.int32), np.array([place], np.int32)
        logits_1V, state, _ = programs.decode(*at, state, None, None)
        if place >= len(prompt) - 1:
            tokens.append(int(np.argmax(logits_1V[0])))
    return tokens[len(prompt) :]


def compare_policies(recorded: PagedModel, shares: Sequence[float]) -> list[Found]:
    """Each policy with each share, on the traces of all layers; layers have caches of their own.

    Args:
      recorded: a model that has read and written, one token at a time.
    Raises:
      UserError: a share that is none, or that holds fewer experts than a token goes to.
    """
    layers = [layer for layer in recorded.layers if layer.table]
    require(any(layer.trace for layer in layers), "no routing was recorded: generate something")
    found = []
    for share in shares:
        slots = [Paging(share).num_slots(_config(layer)) for layer in layers]
        pairs = list(zip(layers, slots, strict=True))
        for has_forecast, policy in product((False, True), POLICIES):
            counts = PagingCounts()
            for layer, num in pairs:
                forecasts = layer.forecasts if has_forecast and any(layer.forecasts) else None
                counts += simulate(layer.trace, num, policy, forecasts)
            name = f"{policy}, forecast" if has_forecast else policy
            found.append(Found(share, slots[0], name, counts))
        least = sum((belady(layer.trace, num) for layer, num in pairs), PagingCounts())
        found.append(Found(share, slots[0], "Belady", least))
    return found


def default_shares(recorded: PagedModel) -> list[float]:
    """An eighth, a quarter, a half and three quarters, of which a token's experts are resident."""
    kinds = [_config(layer) for layer in recorded.layers if layer.table]
    least = max(kind.router.top_k / kind.num_experts for kind in kinds)
    return [share for share in (0.125, 0.25, 0.5, 0.75) if share >= least] or [1.0]


def _config(layer: PagedLayer) -> Any:
    return layer.block.spec.ffn


def table_of(found: Sequence[Found], name: str) -> Table:
    """The same for the terminal."""
    accuracy = next((x.counts.accuracy for x in found if x.counts.accuracy is not None), None)
    table = Table(title=f"Experts of {name}: brought of {found[0].counts.requests:,} asked for")
    for column in ("resident", "policy", "waited for", "brought ahead", "hit rate", "there"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for one in found:
        counts = one.counts
        table.add_row(
            f"{one.num_slots} ({one.share:g})",
            one.policy,
            f"{counts.on_demand:,}",
            f"{counts.ahead:,}",
            f"{counts.hit_rate:.1%}",
            f"{counts.ready_rate:.1%}",
        )
    table.caption = (
        "hit rate: nothing was brought for it; there: resident when asked for, brought ahead or "
        "not" + ("" if accuracy is None else f". Forecasts named {accuracy:.1%}.")
    )
    return table
