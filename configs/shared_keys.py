"""Which layer's keys and values each layer reads, of models in which some make queries alone
(AttentionConfig.shares_keys)."""

import dataclasses
from collections.abc import Sequence

from configs.attention import Attention, AttentionConfig
from configs.checks import require


def shares_keys(attention: Attention) -> bool:
    """Whether the layer reads what another one made."""
    return isinstance(attention, AttentionConfig) and attention.shares_keys


def key_sources(
    prefix: Sequence[Attention], pattern: Sequence[Attention], num_periods: int
) -> tuple[int | None, ...]:
    """Of each layer of the prefix and the pattern, the one whose keys it reads, counted from the
    first of the prefix; None of those that make their own.

    Raises:
      UserError: there is none before it, or another one in each repetition of the pattern.
    """
    attentions, first = (*prefix, *pattern), len(prefix)
    sources: list[int | None] = []
    for i, attention in enumerate(attentions):
        if not shares_keys(attention):
            sources.append(None)
            continue
        assert isinstance(attention, AttentionConfig)
        own = dataclasses.replace(attention, shares_keys=False)
        found = [j for j, other in enumerate(attentions) if other == own]
        source = max((j for j in found if j < i), default=None)
        require(
            source is not None,
            f"layer {i} has attention.shares_keys, and no layer before it has the same attention "
            "with keys of its own: put one there, or leave shares_keys out",
        )
        assert source is not None
        is_each_its_own = i >= first > source and num_periods > 1 and found[-1] > i
        require(
            not is_each_its_own,
            f"layer {i} has attention.shares_keys and reads layer {source} of the prefix at first "
            f"and layer {found[-1]} of the pattern where that repeats: write the repetitions out "
            "as one pattern",
        )
        sources.append(source)
    return tuple(sources)
