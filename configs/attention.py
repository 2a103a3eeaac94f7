"""The kinds of attention that look back at keys, and the union of all kinds that a layer may have;
those with a state of one size are in configs/recurrent_attention.py.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

from dataclasses import dataclass
from typing import Literal

from configs.attention_traits import AttentionTraits, NoAttentionConfig
from configs.checks import require, require_positive
from configs.compressed_attention import CompressedAttentionConfig
from configs.recurrent_attention import GatedDeltaConfig, Mamba2Config, ShortConvConfig
from configs.rope import RopeScaling

QKNorm = Literal["head", "all", "head_unscaled"]


@dataclass(frozen=True, kw_only=True)
class QueryTemperatureConfig:
    """Queries that grow with their position, so that attention over long texts stays sharp: times
    1 + growth * log(1 + floor(position / length)) (Nakanishi 2025; Llama 4, Ministral 3)."""

    growth: float
    length: int
    """Tokens of a step of the growth."""
    counts_itself: bool = False
    """Whether the position counts from 1 (Llama 4)."""

    def __post_init__(self) -> None:
        require_positive(self, "growth", "length")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionTraits):
    """Grouped-query attention (Ainslie et al. 2023) with RoPE, a sliding window and sink tokens."""

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: int
    """Query heads, H."""
    num_kv_heads: int
    """Key/value heads, G; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head."""
    window_size: int | None = None
    """Tokens a query may see, itself included; None means all before it."""
    num_sink_tokens: int = 0
    """First tokens of a document that stay visible beyond the window (StreamingLLM, 2023)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles: theta_d = base^(-2d / head_dim)."""
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """First entries of each head that RoPE turns (GLM-4.5: half of them); None turns all, 0 none:
    such a layer knows no positions (NoPE; every fourth of SmolLM3)."""
    rotary_pairs: Literal["within", "across"] = "within"
    """Which entries rotary_dim's pairs are, and their rates. within: the first rotary_dim, as a
    head of that width. across: the first rotary_dim / 2 of each half of the head, at the rates that
    they have in a head turned whole (Gemma 4, 2026)."""
    chunk_size: int | None = None
    """Tokens of a chunk; a query sees those of its own chunk, however near the others (Llama 4,
    2025)."""
    score_scale: float | None = None
    """Factor of the scores (Granite, Gemma); None is head_dim^-0.5."""
    score_cap: float | None = None
    """Bound c of the scores, c * tanh(score / c) (Gemma 2: 50)."""
    query_temperature: QueryTemperatureConfig | None = None
    """Set for queries that grow with their position."""
    sink_logits: bool = False
    """Whether each query head has a learned logit that takes part in the softmax and has no value,
    so that a head may attend to nothing (gpt-oss, 2025)."""
    bias: bool = False
    """Whether queries, keys, values and the result have a bias (gpt-oss)."""
    output_bias: bool = True
    """Whether, with `bias`, the result has one too (not in Qwen2)."""
    qk_norm: QKNorm | None = None
    """RMSNorm of queries and keys before RoPE: of each head by itself, with one scale for all heads
    (Qwen3, 2025) or none (head_unscaled: Llama 4), or of all heads together, with a scale each
    (OLMoE, 2024)."""
    value_norm: bool = False
    """Whether each head of values has an RMSNorm without a scale (Gemma 4)."""
    values_from_keys: bool = False
    """Whether values are the keys' projection, before norm and RoPE (Gemma 4's global layers)."""
    shares_keys: bool = False
    """Whether the layer makes queries alone and reads the keys and values of the last layer before
    it whose attention is the same but for this (Gemma 4's E models); it keeps no state then."""
    zero_centered_qk_norm: bool = False
    """Whether that norm multiplies by 1 + scale (Gemma 3, Qwen3-Next, 2025)."""
    qk_norm_after_rope: bool = False
    """Whether that norm comes after RoPE instead (Hunyuan, 2024)."""
    clip_qkv: float | None = None
    """Bound on the size of each entry of queries, keys and values, after the norm (OLMoE)."""
    output_gate: bool = False
    """Whether each entry of the heads' results is multiplied by the sigmoid of a projection of the
    token, which has a bias where queries have one (Qwen3-Next, 2025)."""

    def __post_init__(self) -> None:
        _check_heads(self)
        require(
            self.window_size is None or self.window_size > 0,
            f"window_size={self.window_size} must be at least 1 token, or None for all",
        )
        require(
            self.num_sink_tokens >= 0,
            f"num_sink_tokens={self.num_sink_tokens} must not be negative",
        )
        require(
            self.num_sink_tokens == 0 or self.window_size is not None,
            f"num_sink_tokens={self.num_sink_tokens} has no effect with window_size=None: "
            "set a window_size or num_sink_tokens=0",
        )
        _check_rotary(self)
        _check_chunk(self)
        require(
            self.score_cap is None or self.score_cap > 0,
            f"score_cap={self.score_cap} must be greater than 0, or None for no bound",
        )
        require(
            not (self.values_from_keys and self.bias),
            "values_from_keys is not built with bias=True: leave one of them out",
        )
        require(
            self.score_scale is None or self.score_scale > 0,
            f"score_scale={self.score_scale} must be greater than 0, or None for head_dim^-0.5",
        )
        require(
            not self.qk_norm_after_rope or (self.qk_norm is not None and self.rotary_dim != 0),
            f"qk_norm_after_rope has no effect with qk_norm={self.qk_norm!r} and rotary_dim="
            f"{self.rotary_dim}: it needs a norm and RoPE",
        )
        require(
            not self.zero_centered_qk_norm or self.qk_norm in ("head", "all"),
            f"zero_centered_qk_norm=True has no effect with qk_norm={self.qk_norm!r}, which has no "
            "scale: leave it out",
        )
        require(
            self.output_bias or self.bias,
            "output_bias=False has no effect with bias=False: leave it out",
        )
        require(
            self.clip_qkv is None or self.clip_qkv > 0,
            f"clip_qkv={self.clip_qkv} must be greater than 0, or None for no bound",
        )

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer's attention: queries and output, keys and values, sink logits,
        biases, norms.
        """
        heads, groups, width = self.num_heads, self.num_kv_heads, self.head_dim
        groups = 0 if self.shares_keys else groups
        matrices = d_model * width * (2 * heads + groups * (1 if self.values_from_keys else 2))
        biases = width * (heads + 2 * groups) if self.bias else 0
        biases += d_model if self.bias and self.output_bias else 0
        if self.qk_norm == "all":
            norms = width * (heads + groups)
        else:
            norms = (2 if groups else 1) * width if self.qk_norm == "head" else 0
        if self.output_gate:
            matrices += d_model * width * heads
            biases += width * heads if self.bias else 0
        return matrices + (heads if self.sink_logits else 0) + biases + norms


@dataclass(frozen=True, kw_only=True)
class LocalSparseAttentionConfig(AttentionTraits):
    """Grouped-query attention over a window and O(log n) places before it, with RoPE."""

    kind: Literal["local_sparse"] = "local_sparse"
    num_heads: int
    """Query heads, H."""
    num_kv_heads: int
    """Key/value heads, G; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head."""
    window_size: int
    """Tokens a query sees one by one, itself included."""
    num_sink_tokens: int = 4
    """powers_of_two only: first tokens of a document that stay visible (StreamingLLM, 2023)."""
    far: Literal["powers_of_two", "summaries"] = "powers_of_two"
    """What is seen before the window. powers_of_two: the tokens 1, 2, 4, 8, ... back (LogSparse,
    Li et al. 2019). summaries: one pooled key and value for each of O(log n) dyadic buckets, which
    together hold all of it (H-Transformer-1D, 2021; the Fenwick partition of Guo et al. 2025)."""
    block_size: int | None = None
    """summaries only: tokens of the smallest bucket; the window grows to whole blocks."""
    rope_base: float = 10_000.0
    """Base of the rotary angles: theta_d = base^(-2d / head_dim)."""

    def __post_init__(self) -> None:
        _check_heads(self)
        require_positive(self, "window_size")
        require(
            self.num_sink_tokens >= 0,
            f"num_sink_tokens={self.num_sink_tokens} must not be negative",
        )
        is_pooled = self.far == "summaries"
        require(
            self.num_sink_tokens == 0 or not is_pooled,
            f"num_sink_tokens={self.num_sink_tokens} has no effect with far='summaries', "
            "whose buckets hold the first tokens too: set num_sink_tokens=0",
        )
        require(
            (self.block_size is not None) == is_pooled,
            f"block_size={self.block_size} goes with far='summaries' and only with it, got "
            f"far={self.far!r}",
        )
        require(
            self.block_size is None or self.block_size > 0,
            f"block_size={self.block_size} must be at least 1 token",
        )

    @property
    def unskippable_reason(self) -> str | None:
        return (
            "a layer with depth sees only the chosen tokens, between which powers of two and "
            "summaries have gaps: give it attention.kind='grouped_query' or 'latent'"
        )

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer: queries and output, keys and values, pooling vectors."""
        matrices = 2 * d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        pooling = self.num_kv_heads * self.head_dim if self.far == "summaries" else 0
        return matrices + pooling


def _check_rotary(config: AttentionConfig) -> None:
    turned = config.rotary_dim
    require(
        turned is None or (0 <= turned < config.head_dim and turned % 2 == 0),
        f"rotary_dim={turned} must be even, at least 0 and below head_dim={config.head_dim}; None "
        "turns whole heads",
    )
    require(
        config.rotary_pairs == "within" or bool(turned),
        f"rotary_pairs='across' has no effect with rotary_dim={turned}: leave it out",
    )
    is_plain = config.rope_base == 10_000.0 and config.rope_scaling is None
    require(
        turned != 0 or is_plain,
        f"rope_base={config.rope_base} and rope_scaling={config.rope_scaling} have no effect with "
        "rotary_dim=0, which turns nothing: leave them out",
    )


def _check_chunk(config: AttentionConfig) -> None:
    size = config.chunk_size
    require(
        size is None or size > 0,
        f"chunk_size={size} must be at least 1 token, or None for no chunks",
    )
    require(
        size is None or config.window_size is None,
        f"chunk_size={size} and window_size={config.window_size} both say what a query sees: leave "
        "one of them out",
    )


def _check_heads(config: AttentionConfig | LocalSparseAttentionConfig) -> None:
    require_positive(config, "num_heads", "num_kv_heads", "head_dim", "rope_base")
    require(
        config.num_heads % config.num_kv_heads == 0,
        f"num_heads={config.num_heads} must be divisible by num_kv_heads={config.num_kv_heads}",
    )
    require(config.head_dim % 2 == 0, f"head_dim={config.head_dim} must be even: RoPE turns pairs")


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Which keys a query of latent attention sees: those that a small attention of its own scores
    best (DeepSeek-V3.2's sparse attention, 2025)."""

    num_heads: int
    """Heads that score, H_I."""
    head_dim: int
    """Width of their queries and of the one key they share, C_I."""
    top_k: int
    """Keys that a query sees."""
    loss_weight: float = 1.0
    """Of the loss from which it alone learns: the divergence of its scores from the attention's
    weights over the keys that it chose."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "top_k", "loss_weight")

    def num_parameters(self, d_model: int, query_rank: int) -> int:
        """Weights of queries, the key and its norm, and how much each head counts."""
        queries = query_rank * self.num_heads * self.head_dim
        return queries + d_model * (self.head_dim + self.num_heads) + 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(AttentionTraits):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are projections
    of one small vector per token, which alone is cached beside one rotary key."""

    kind: Literal["latent"] = "latent"
    num_heads: int
    query_rank: int | None
    """Width of the queries' own bottleneck; None projects them directly (V2-Lite)."""
    latent_rank: int
    """Width of the cached vector."""
    nope_head_dim: int
    """Part of a head's queries and keys without position."""
    rope_head_dim: int
    """Part with RoPE; its key is shared by all heads."""
    value_head_dim: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    indexer: IndexerConfig | None = None
    """Set for sparse attention: it chooses the keys."""
    shares_indexer: bool = False
    """Whether the layer has no weights of the indexer, and its queries see the keys that those of
    the last layer before it chose whose attention is the same but for this (GLM-5.2, 2026)."""
    bias: bool = False
    """Whether the projections down and out have biases; those up have none (DeepSeek's
    attention_bias)."""
    has_rope: bool = True
    """Whether RoPE turns the part that is meant for it; where it does not, the layer knows no
    positions (Kimi Linear, 2025)."""

    def __post_init__(self) -> None:
        widths = ("latent_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        require_positive(self, "num_heads", *widths, "rope_base")
        require(
            self.query_rank is None or self.query_rank > 0,
            f"query_rank={self.query_rank} must be at least 1, or None for none",
        )
        require(
            self.rope_head_dim % 2 == 0,
            f"rope_head_dim={self.rope_head_dim} must be even: RoPE turns pairs",
        )
        is_plain = self.rope_base == 10_000.0 and self.rope_scaling is None
        require(
            self.has_rope or (is_plain and self.indexer is None),
            f"rope_base={self.rope_base}, rope_scaling={self.rope_scaling} and indexer need RoPE, "
            "and has_rope=False turns nothing: leave them out",
        )
        require(
            self.indexer is not None or not self.shares_indexer,
            "shares_indexer=True has no effect with indexer=None: leave it out, or set the indexer "
            "of the layer whose choice is taken",
        )
        if self.indexer is not None:
            self._check_indexer(self.indexer)

    def _check_indexer(self, indexer: IndexerConfig) -> None:
        require(
            self.query_rank is not None,
            "indexer reads the queries' bottleneck, and query_rank=None has none: set query_rank",
        )
        require(
            indexer.head_dim >= self.rope_head_dim,
            f"indexer.head_dim={indexer.head_dim} must be at least rope_head_dim="
            f"{self.rope_head_dim}: so many of its entries are turned",
        )

    @property
    def own_indexer(self) -> IndexerConfig | None:
        """The indexer where the layer has weights and keys of it."""
        return None if self.shares_indexer else self.indexer

    @property
    def query_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.value_head_dim

    def num_parameters(self, d_model: int) -> int:
        heads, rank = self.num_heads, self.query_rank
        width = heads * self.query_head_dim
        queries = d_model * width if rank is None else rank * (d_model + width + 1)
        down = d_model * (self.latent_rank + self.rope_head_dim) + self.latent_rank
        up = self.latent_rank * heads * (self.nope_head_dim + self.value_head_dim)
        indexer = self.own_indexer
        chooser = indexer.num_parameters(d_model, rank) if indexer and rank else 0
        biases = (rank or 0) + self.latent_rank + self.rope_head_dim + d_model if self.bias else 0
        return queries + down + up + self.out_width * d_model + chooser + biases


@dataclass(frozen=True, kw_only=True)
class RelativeAttentionConfig(AttentionTraits):
    """Attention by relative position over a memory of earlier segments (Transformer-XL, 2019).

    Every query sees itself and the memory_length tokens before it in its document, so the result
    does not depend on where a text is cut into segments.
    """

    kind: Literal["relative"] = "relative"
    num_heads: int
    head_dim: int
    memory_length: int
    """Tokens before a query that it sees, M; as many are kept from one segment to the next."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim")
        require(
            self.memory_length >= 1,
            f"memory_length={self.memory_length} must be at least 1 token: a query that sees only "
            "itself needs no relative attention",
        )

    @property
    def memory_tokens(self) -> int | None:
        return self.memory_length

    @property
    def window_size(self) -> int:
        """Tokens a query may see, itself included."""
        return self.memory_length + 1

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of queries, keys, values, distances and output, and two biases on the queries."""
        return (5 * d_model + 2) * self.out_width


Attention = (
    AttentionConfig
    | LatentAttentionConfig
    | LocalSparseAttentionConfig
    | RelativeAttentionConfig
    | CompressedAttentionConfig
    | GatedDeltaConfig
    | ShortConvConfig
    | Mamba2Config
    | NoAttentionConfig
)
