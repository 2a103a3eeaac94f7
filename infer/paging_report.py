"""What paging would bring: policies beside Belady's rule, on the routing that a model recorded."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rich.table import Table

from configs.checks import require
from infer.expert_cache import POLICIES, PagingCounts, belady, simulate
from infer.expert_paging import PagedLayer, PagedModel
from infer.expert_store import Paging


@dataclass(frozen=True)
class Found:
    """One policy with one share of the experts resident."""

    share: float
    num_slots: int
    """Of the first layer with experts."""
    policy: str
    counts: PagingCounts
    accuracy: float | None = None
    """The share of requests that the forecast named."""

    def as_tree(self) -> dict[str, Any]:
        rates = {"hit_rate": self.counts.hit_rate, "ready_rate": self.counts.ready_rate}
        return dataclasses.asdict(self) | rates


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
                forecasts = layer.forecasts if has_forecast else None
                counts += simulate(layer.trace, num, policy, forecasts)
            name = f"{policy}, forecast" if has_forecast else policy
            accuracy = recorded.accuracy() if has_forecast else None
            found.append(Found(share, slots[0], name, counts, accuracy))
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
    accuracy = next((x.accuracy for x in found if x.accuracy is not None), None)
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
