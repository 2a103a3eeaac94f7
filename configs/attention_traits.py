"""What every kind of attention says of itself."""


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
