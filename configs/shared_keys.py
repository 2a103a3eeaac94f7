"""Which layer each layer reads, of models in which some read what an earlier one made: its keys and
values (AttentionConfig.shares_keys), or the keys that its indexer chose
(LatentAttentionConfig.shares_indexer)."""

import dataclasses
from collections.abc import Sequence
from typing import cast

from configs.attention import Attention, AttentionConfig, LatentAttentionConfig
from configs.checks import require


def shares_keys(attention: Attention) -> bool:
    """Whether the layer reads what another one made."""
    return sharing_setting(attention) is not None


def sharing_setting(attention: Attention) -> str | None:
    """The setting by which the layer reads what another one made; None where it makes its own."""
    if isinstance(attention, AttentionConfig) and attention.shares_keys:
        return "shares_keys"
    if isinstance(attention, LatentAttentionConfig) and attention.shares_indexer:
        return "shares_indexer"
    return None


def with_own_keys(attention: Attention) -> Attention:
    """The same attention where it reads no other layer: what its source has."""
    setting = sharing_setting(attention)
    if setting is None:
        return attention
    return cast(Attention, dataclasses.replace(attention, **{setting: False}))


def key_sources(
    prefix: Sequence[Attention], pattern: Sequence[Attention], num_periods: int
) -> tuple[int | None, ...]:
    """Of each layer of the prefix and the pattern, the one that it reads, counted from the first of
    the prefix; None of those that make their own.

    Raises:
      UserError: there is none before it, or another one in each repetition of the pattern.
    """
    attentions, first = (*prefix, *pattern), len(prefix)
    last = {each: i for i, each in enumerate(attentions) if not shares_keys(each)}
    before: dict[Attention, int] = {}
    sources: list[int | None] = []
    for i, attention in enumerate(attentions):
        setting = sharing_setting(attention)
        if setting is None:
            before[attention] = i
            sources.append(None)
            continue
        own = with_own_keys(attention)
        source = before.get(own)
        require(
            source is not None,
            f"layer {i} has attention.{setting}, and no layer before it has the same attention "
            f"without it: put one there, or leave {setting} out",
        )
        assert source is not None
        is_each_its_own = i >= first > source and num_periods > 1 and last[own] > i
        require(
            not is_each_its_own,
            f"layer {i} has attention.{setting} and reads layer {source} of the prefix at first "
            f"and layer {last[own]} of the pattern where that repeats: write the repetitions out "
            "as one pattern",
        )
        sources.append(source)
    return tuple(sources)
