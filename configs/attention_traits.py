"""What every kind of attention says of itself, and the kind that is none."""

from dataclasses import dataclass
from typing import Literal


class AttentionTraits:
    """What a kind of attention says of itself beside its settings, here as most do.

    Each config has num_heads, out_width and num_parameters(d_model) as well.
    """

    @property
    def memory_tokens(self) -> int | None:
        """Tokens that a layer keeps from one segment of a stream to the next; None: there is no
        such memory."""
        return None

    @property
    def unskippable_reason(self) -> str | None:
        """Why tokens can't pass such a layer by (Mixture-of-Depths), in a sentence; None: they
        can."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoAttentionConfig(AttentionTraits):
    """No attention: a layer that is a feed-forward alone (Nemotron-H, 2025)."""

    kind: Literal["none"] = "none"

    @property
    def unskippable_reason(self) -> str | None:
        return "a layer with depth needs an attention"

    @property
    def num_heads(self) -> int:
        """Nothing is mixed."""
        return 1

    @property
    def out_width(self) -> int:
        """Of nothing."""
        return 1

    def num_parameters(self, d_model: int) -> int:
        del d_model
        return 0
