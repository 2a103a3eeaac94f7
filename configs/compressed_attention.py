"""Attention over a window and over compressed entries of what lies before it (DeepSeek-V4, 2026).

Frozen and made of plain values, like all configs: see configs/base.py.
"""

from dataclasses import dataclass
from typing import Literal

from configs.attention_traits import AttentionTraits
from configs.checks import require, require_positive
from configs.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class EntryIndexerConfig:
    """Which compressed entries a query sees: those that a small attention of its own, over entries
    that it compresses itself, scores best."""

    num_heads: int
    """Heads that score."""
    head_dim: int
    """Width of their queries and of its entries."""
    top_k: int
    """Entries that a query sees."""
    loss_weight: float = 1.0
    """Of the loss from which it alone learns, as IndexerConfig's."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "top_k", "loss_weight")


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How blocks of tokens become entries: the mean of a projection of theirs, weighted channel by
    channel by a softmax over the block."""

    rate: int
    """Tokens of a block, m; entry i is seen from the last token of block i on."""
    overlaps: bool = False
    """Whether an entry is made of the block before its own, too, which gives it projections of its
    own (compressed sparse attention)."""
    indexer: EntryIndexerConfig | None = None
    """Set where a query sees some of the entries (compressed sparse attention); None: it sees them
    all (heavily compressed attention)."""

    def __post_init__(self) -> None:
        require(
            self.rate >= 2,
            f"compression.rate={self.rate} must be at least 2 tokens: a block of one is the token",
        )

    @property
    def num_series(self) -> int:
        """Projections of a token: one for its own block's entry, and one for the next's."""
        return 2 if self.overlaps else 1

    def num_parameters(self, d_model: int, width: int) -> int:
        """Of a compressor: values and weights of each series, places in the block, the norm."""
        return self.num_series * width * (2 * d_model + self.rate) + width


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig(AttentionTraits):
    """Attention of many query heads over one head, whose keys are its values: over a window of
    tokens, and over compressed entries of all that lies before."""

    kind: Literal["compressed"] = "compressed"
    num_heads: int
    query_rank: int
    """Width of the queries' bottleneck."""
    head_dim: int
    rotary_dim: int
    """Last entries of each head that RoPE turns; those of the result are turned back."""
    window_size: int
    """Tokens a query sees as they are, itself included."""
    compression: CompressionConfig | None = None
    """None: the window is all."""
    num_output_groups: int
    """Groups of heads with an output matrix of their own ..."""
    output_rank: int
    """... to so many entries, which one matrix brings to d_model."""
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "query_rank", "head_dim", "rotary_dim", "window_size")
        require_positive(self, "num_output_groups", "output_rank", "rope_base")
        require(
            self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}",
        )
        require(
            self.num_heads % self.num_output_groups == 0,
            f"num_heads={self.num_heads} must be divisible by num_output_groups="
            f"{self.num_output_groups}",
        )
        indexer = self.compression and self.compression.indexer
        require(
            indexer is None or indexer.head_dim >= self.rotary_dim,
            f"compression.indexer.head_dim={indexer and indexer.head_dim} must be at least "
            f"rotary_dim={self.rotary_dim}: so many of its entries are turned",
        )

    @property
    def unskippable_reason(self) -> str | None:
        return "a layer with depth sees only the chosen tokens, and blocks of tokens need them all"

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer: queries, keys, sinks, output, compressor, indexer."""
        rank, width = self.query_rank, self.head_dim
        queries = rank * (d_model + 1 + self.out_width)
        keys = width * (d_model + 1)
        mixed = self.num_output_groups * self.output_rank
        output = self.out_width * self.output_rank + mixed * d_model
        total = queries + keys + self.num_heads + output
        if self.compression is None:
            return total
        total += self.compression.num_parameters(d_model, width)
        indexer = self.compression.indexer
        if indexer is None:
            return total
        chooser = indexer.num_heads * (rank * indexer.head_dim + d_model)
        return total + chooser + self.compression.num_parameters(d_model, indexer.head_dim)
