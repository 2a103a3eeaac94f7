"""What a model is: the part of a config that its checkpoint depends on.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

import math
import typing
from dataclasses import dataclass
from typing import Literal

from configs.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """RoPE stretched to longer contexts (YaRN, Peng et al. 2023).

    A pair that turns r times over original_length keeps its angle where r >= beta_fast, turns
    `factor` times slower where r <= beta_slow, and something between in between; logits are
    multiplied by (0.1 ln factor + 1)^2.
    """

    factor: float
    """New context length over the original one."""
    original_length: int
    """Tokens of context the model was trained on."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "original_length", "beta_slow")
        require(self.factor >= 1, f"yarn.factor={self.factor} must be at least 1")
        require(
            self.beta_slow < self.beta_fast,
            f"yarn.beta_slow={self.beta_slow} must be below yarn.beta_fast={self.beta_fast}",
        )

    @property
    def logit_scale(self) -> float:
        return (0.1 * math.log(self.factor) + 1.0) ** 2


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
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
    num_sinks: int = 0
    """First tokens of a document that stay visible beyond the window (StreamingLLM, 2023)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles: theta_d = base^(-2d / head_dim)."""
    yarn: YarnConfig | None = None
    learned_sinks: bool = False
    """Whether each query head has a learned logit that takes part in the softmax and has no value,
    so that a head may attend to nothing (gpt-oss, 2025)."""

    def __post_init__(self) -> None:
        _check_heads(self)
        require(
            self.window_size is None or self.window_size > 0,
            f"window_size={self.window_size} must be at least 1 token, or None for all",
        )
        require(self.num_sinks >= 0, f"num_sinks={self.num_sinks} must not be negative")
        require(
            self.num_sinks == 0 or self.window_size is not None,
            f"num_sinks={self.num_sinks} has no effect with window_size=None: set a window_size "
            "or num_sinks=0",
        )

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer's attention: queries and output, keys and values, sink logits."""
        matrices = 2 * d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        return matrices + (self.num_heads if self.learned_sinks else 0)


@dataclass(frozen=True, kw_only=True)
class LocalSparseAttentionConfig:
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
    num_sinks: int = 4
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
        require(self.num_sinks >= 0, f"num_sinks={self.num_sinks} must not be negative")
        is_pooled = self.far == "summaries"
        require(
            self.num_sinks == 0 or not is_pooled,
            f"num_sinks={self.num_sinks} has no effect with far='summaries', whose buckets hold "
            "the first tokens too: set num_sinks=0",
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
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of one layer: queries and output, keys and values, pooling vectors."""
        matrices = 2 * d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        pooling = self.num_kv_heads * self.head_dim if self.far == "summaries" else 0
        return matrices + pooling


def _check_heads(config: AttentionConfig | LocalSparseAttentionConfig) -> None:
    require_positive(config, "num_heads", "num_kv_heads", "head_dim", "rope_base")
    require(
        config.num_heads % config.num_kv_heads == 0,
        f"num_heads={config.num_heads} must be divisible by num_kv_heads={config.num_kv_heads}",
    )
    require(config.head_dim % 2 == 0, f"head_dim={config.head_dim} must be even: RoPE turns pairs")


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
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
    yarn: YarnConfig | None = None

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
        return queries + down + up + self.out_width * d_model


@dataclass(frozen=True, kw_only=True)
class RelativeAttentionConfig:
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


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense SwiGLU feed-forward layer: W_down(silu(W_gate x) * W_up x)."""

    kind: Literal["dense"] = "dense"
    d_ff: int
    """Hidden width, F."""

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")

    def num_parameters(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff

    def num_active_parameters(self, d_model: int) -> int:
        return self.num_parameters(d_model)


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What a router sees besides the token's own hidden state."""

    kind: Literal["causal", "correlation"]
    """causal: attention over the window before the token, added to the logits through a matrix that
    starts at zero. correlation: the experts attend to each other (Yuan 2.0-M32, 2024), token by
    token."""
    window_size: int | None = None
    """causal only: tokens it sees, the token included."""
    num_heads: int = 2
    head_dim: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim")
        require(
            (self.window_size is not None) == (self.kind == "causal"),
            f"router.context.window_size={self.window_size} goes with kind='causal' and only with "
            f"it, got kind={self.kind!r}",
        )
        require(
            self.window_size is None or self.window_size > 0,
            f"router.context.window_size={self.window_size} must be at least 1 token",
        )

    def attention(self) -> AttentionConfig:
        """The causal kind's attention over the hidden states."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            window_size=self.window_size,
        )

    def num_parameters(self, d_model: int, num_experts: int) -> int:
        if self.kind == "correlation":
            return 3 * d_model * num_experts
        return self.num_heads * self.head_dim * (3 * d_model + num_experts)


@dataclass(frozen=True, kw_only=True)
class BiasWarmupConfig:
    """How the reserved twins of grown experts enter the choice: see model/warmup.py."""

    steps: int
    """Over which the twins' biases rise to their parents'."""
    factor: int = 2
    """Experts that each parent became; twins of expert e are e + E / factor and so on."""

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        require(self.factor >= 2, f"warmup.factor={self.factor} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How experts are scored and chosen, and what keeps their load even."""

    top_k: int
    """Choices per token, K; with null experts, the most experts a token can have."""
    scores: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    """Of the logits: Mixtral's, DeepSeek-V3's, DeepSeek-V4's."""
    normalize_gates: bool = True
    """Whether the chosen gates are rescaled to sum to 1."""
    gate_scale: float = 1.0
    """Factor of all gates (DeepSeek-V3: 2.5)."""
    num_groups: int | None = None
    """Group-limited choice (DeepSeek-V3): experts lie in this many groups of neighbours ..."""
    top_groups: int | None = None
    """... and only those in the groups with the best two experts' sums may be chosen."""
    num_null_experts: int = 0
    """Choices that may fall on no expert at all (AdaMoE, 2024): k is top_k - num_null_experts to
    top_k."""
    target_k: float | None = None
    """With null experts: mean experts per token, held by a controller on the nulls' logit."""
    context: ContextConfig | None = None
    balance: Literal["none", "loss_free", "quantile"] = "none"
    """A bias on the choice, never on the gates, moved after each step: by the sign of the load
    error (Wang et al. 2024), or to the quantile at which each expert gets its share (Su 2026)."""
    bias_rate: float | None = None
    """loss_free: the bias's step (1e-3). quantile: how far it moves to its new value (1: all)."""
    warmup: BiasWarmupConfig | None = None
    """Of reserved experts after growth; then `balance` takes over."""
    load_balance_weight: float = 1e-2
    """Weight of the Switch load-balance loss E * sum f_i P_i (Fedus et al. 2021)."""
    sequence_weight: float = 0.0
    """Weight of the same loss for each sequence on its own (DeepSeek-V3: 1e-4)."""
    entropy_weight: float = 0.0
    """Weight of -I(token; expert): confident tokens, even use (LIMoE, Mod-Squad, 2022)."""
    z_loss_weight: float = 1e-3
    """Weight of mean(logsumexp(router_logits)^2) (ST-MoE, 2022)."""

    def __post_init__(self) -> None:
        require_positive(self, "top_k", "gate_scale")
        weights = ("load_balance_weight", "sequence_weight", "entropy_weight", "z_loss_weight")
        for name in weights:
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        self._check_groups()
        self._check_nulls()
        require(
            (self.bias_rate is not None) == (self.balance != "none"),
            f"router.bias_rate={self.bias_rate} goes with balance='loss_free' or 'quantile', got "
            f"balance={self.balance!r}",
        )
        require(
            self.bias_rate is None or 0 < self.bias_rate <= 1,
            f"router.bias_rate={self.bias_rate} must lie in (0, 1]",
        )
        require(
            self.warmup is None or self.balance != "none",
            "router.warmup moves a router's bias: set router.balance and router.bias_rate",
        )

    def _check_groups(self) -> None:
        groups, best = self.num_groups, self.top_groups
        require(
            (groups is None) == (best is None),
            f"router.num_groups={groups} and router.top_groups={best} go together: set both or "
            "none",
        )
        require(
            groups is None or (best is not None and 0 < best < groups),
            f"router.top_groups={best} must lie between 1 and num_groups={groups} less one",
        )

    def _check_nulls(self) -> None:
        nulls, least = self.num_null_experts, self.top_k - self.num_null_experts
        require(nulls >= 0, f"router.num_null_experts={nulls} must not be negative")
        require(
            least >= 1,
            f"router.num_null_experts={nulls} must be below top_k={self.top_k}, so that every "
            "token "
            "has an expert",
        )
        require(
            (self.target_k is not None) == (nulls > 0),
            f"router.target_k={self.target_k} goes with null experts and only with them, got "
            f"num_null_experts={nulls}",
        )
        require(
            self.target_k is None or least < self.target_k < self.top_k,
            f"router.target_k={self.target_k} must lie between {least} and top_k={self.top_k}",
        )
        require(
            nulls == 0 or self.normalize_gates,
            "null experts need normalize_gates=True: the gates of the others must still sum to 1",
        )

    @property
    def mean_k(self) -> float:
        """Experts per token on average."""
        return self.target_k if self.target_k is not None else self.top_k


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """SwiGLU experts, some routed and some shared by every token (DeepSeekMoE, 2024)."""

    kind: Literal["moe"] = "moe"
    num_experts: int
    """Routed experts, E."""
    d_ff: int
    """Hidden width of one expert, F."""
    num_shared_experts: int = 0
    """Experts that are always on, held as one dense layer of num_shared_experts * d_ff."""
    router: RouterConfig

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "d_ff")
        require(
            self.num_shared_experts >= 0,
            f"num_shared_experts={self.num_shared_experts} must not be negative",
        )
        require(
            self.router.top_k <= self.num_experts,
            f"router.top_k={self.router.top_k} must not exceed num_experts={self.num_experts}",
        )
        warmup = self.router.warmup
        require(
            warmup is None or self.num_experts % warmup.factor == 0,
            f"num_experts={self.num_experts} must be divisible by router.warmup.factor="
            f"{warmup and warmup.factor}",
        )
        self._check_groups()

    def _check_groups(self) -> None:
        groups, best = self.router.num_groups, self.router.top_groups
        if groups is None or best is None:
            return
        size = self.num_experts // groups
        require(
            self.num_experts % groups == 0 and size >= 2,
            f"num_experts={self.num_experts} must be divisible into router.num_groups={groups} "
            "groups of at least 2",
        )
        require(
            self.router.top_k <= best * size,
            f"router.top_k={self.router.top_k} must not exceed the {best * size} experts of "
            f"router.top_groups={best} groups",
        )

    def _num_parameters(self, d_model: int, experts: float) -> int:
        ffns = round(3 * d_model * self.d_ff * (experts + self.num_shared_experts))
        context = self.router.context
        extra = context.num_parameters(d_model, self.num_experts) if context else 0
        own = 0 if context and context.kind == "correlation" else d_model * self.num_experts
        return ffns + own + extra

    def num_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.num_experts)

    def num_active_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.router.mean_k)


Attention = (
    AttentionConfig | LatentAttentionConfig | LocalSparseAttentionConfig | RelativeAttentionConfig
)


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig:
    """A layer that works on some of the tokens; the others pass by (Raposo et al. 2024)."""

    capacity: float
    """Share of a row's tokens that the layer works on (the paper: 0.125, every second layer)."""
    selection: Literal["top_capacity", "threshold"] = "top_capacity"
    """top_capacity: the best of the row, which looks ahead: for training. threshold: each token
    whose logit is above 0, by itself: for scoring and generating (model/depth.py: `causal`)."""
    predictor_weight: float = 1e-2
    """Weight of the cross-entropy that teaches the logit's sign to tell the chosen from the rest,
    as a share of one token's."""

    def __post_init__(self) -> None:
        require(0 < self.capacity <= 1, f"depth.capacity={self.capacity} must lie in (0, 1]")
        require_positive(self, "predictor_weight")


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """Training that makes earlier layers predict well (LayerSkip, Elhoushi et al. 2024); exits lie
    after each period of the pattern. See model/early_exit.py."""

    dropout: float
    """Chance, p_max, that a row of the batch skips the last period; earlier ones less (0.1)."""
    loss_scale: float
    """e_s: how much the exits' losses count beside the last layer's (0.1 to 1)."""
    rotation: int
    """R: a step supervises one in R exits, in turn, and always the last layer."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"early_exit.dropout={self.dropout} must lie in [0, 1)")
        require_positive(self, "loss_scale", "rotation")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: which attention, which feed-forward, and whether tokens may pass it by."""

    attention: Attention
    ffn: DenseConfig | MoEConfig
    depth: MixtureOfDepthsConfig | None = None

    def __post_init__(self) -> None:
        require(
            self.depth is None or not isinstance(self.attention, LocalSparseAttentionConfig),
            "a layer with depth sees only the chosen tokens, between which powers of two and "
            "summaries have gaps: give it attention.kind='grouped_query' or 'latent'",
        )


@dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """Training on tokens beyond the next one (DeepSeek-V3, 2024, section 2.2)."""

    depth: int = 1
    """Extra tokens predicted at each place, by as many modules, each fed by the one before it."""
    layer: LayerSpec
    """The one layer of a module."""
    loss_weight: float = 0.3
    """Weight of the mean of the modules' losses beside the next token's (DeepSeek-V3: 0.3, later
    0.1)."""

    def __post_init__(self) -> None:
        require(self.depth > 0, f"multi_token.depth={self.depth} must be at least 1 extra token")
        require(
            self.loss_weight > 0,
            f"multi_token.loss_weight={self.loss_weight} must be greater than 0: leave multi_token "
            "out to train without it",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only model: `prefix`, then `pattern` repeated up to `num_layers` layers in all."""

    vocab_size: int
    d_model: int
    num_layers: int
    pattern: tuple[LayerSpec, ...]
    """The repeating period of layers, e.g. five local layers and a global one."""
    prefix: tuple[LayerSpec, ...] = ()
    """Dense layers before the pattern (DeepSeek-V3: the first three)."""
    context_length: int
    """Longest sequence, in tokens, that the model is trained or asked to read."""
    tie_embeddings: bool = False
    """Whether the output layer is the transposed input embedding."""
    norm_eps: float = 1e-6
    early_exit: EarlyExitConfig | None = None
    exit_spacing: int | None = None
    """Layers between two exits; None: those of the pattern. Training knows no other."""
    multi_token: MultiTokenConfig | None = None
    """Modules that learn to predict further ahead; only training computes them."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "d_model", "num_layers", "context_length", "norm_eps")
        require(len(self.pattern) > 0, "pattern is empty: give at least one LayerSpec")
        require(
            self.num_layers > len(self.prefix)
            and (self.num_layers - len(self.prefix)) % len(self.pattern) == 0,
            f"num_layers={self.num_layers} must be the prefix's {len(self.prefix)} layers and a "
            f"multiple of the pattern's {len(self.pattern)} layers",
        )
        require(
            all(isinstance(spec.ffn, DenseConfig) for spec in self.prefix),
            "prefix has an MoE layer: layers before the pattern must be dense",
        )
        require(
            all(spec.depth is None for spec in self.prefix),
            "prefix has a layer with depth: layers before the pattern work on every token",
        )
        self._check_early_exit()
        self._check_memory()

    def _check_early_exit(self) -> None:
        periodic, spacing = self.num_layers - len(self.prefix), self.exit_spacing
        require(
            spacing is None or (spacing > 0 and periodic % spacing == 0),
            f"exit_spacing={spacing} must divide the {periodic} layers after the prefix",
        )
        require(
            self.early_exit is None or self.num_exits >= 2,
            f"early_exit needs at least 2 periods of the pattern to leave between, got "
            f"{self.num_exits}: add layers or shorten the pattern",
        )
        require(
            self.early_exit is None or self.num_layers - periodic // self.num_exits >= 2,
            "early_exit would train nothing: its loss gives the exit after the first layer no "
            "weight, and there is no other; add layers",
        )

    def _check_memory(self) -> None:
        specs = (*self.prefix, *self.pattern)
        attentions = [spec.attention for spec in specs]
        relative = [a for a in attentions if isinstance(a, RelativeAttentionConfig)]
        if not relative:
            return
        require(
            len(relative) == len(attentions),
            f"{len(relative)} of {len(attentions)} layers of prefix and pattern have relative "
            "attention: memory goes from segment to segment in every layer or in none, give all of "
            "them kind='relative'",
        )
        lengths = sorted({attention.memory_length for attention in relative})
        require(
            len(lengths) == 1,
            f"layers have memory_length={lengths}: give all of them the same",
        )
        require(
            self.d_model % 2 == 0,
            f"d_model={self.d_model} must be even: relative attention codes distances in sines and "
            "cosines",
        )
        contexts = [s.ffn.router.context for s in specs if isinstance(s.ffn, MoEConfig)]
        require(
            all(context is None or context.kind != "causal" for context in contexts),
            "router.context.kind='causal' has no memory of earlier segments, which relative "
            "attention needs: use kind='correlation' or no context",
        )
        require(
            all(spec.depth is None for spec in specs),
            "layers with depth keep no memory of the tokens that pass them by, which relative "
            "attention needs: leave depth out",
        )

    @property
    def memory_length(self) -> int | None:
        """Tokens that each layer keeps from one segment to the next; None without memory."""
        attention = self.pattern[0].attention
        is_relative = isinstance(attention, RelativeAttentionConfig)
        return attention.memory_length if is_relative else None

    @property
    def num_periods(self) -> int:
        return (self.num_layers - len(self.prefix)) // len(self.pattern)

    @property
    def num_exits(self) -> int:
        """Places where a token may leave the model, its end among them."""
        return (self.num_layers - len(self.prefix)) // (self.exit_spacing or len(self.pattern))

    @property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """Each layer of the prefix and the pattern once, and the multi-token modules' layer."""
        extra = () if self.multi_token is None else (self.multi_token.layer,)
        return (*self.prefix, *self.pattern, *extra)

    @property
    def num_parameters(self) -> int:
        """All weights, embeddings and norms included; multi-token modules are counted apart."""
        return self._count(lambda ffn: ffn.num_parameters(self.d_model))

    @property
    def num_multi_token_parameters(self) -> int:
        """The multi-token modules' own weights: embedding and output layer are the model's."""
        if self.multi_token is None:
            return 0
        layer, width = self.multi_token.layer, self.d_model
        own = layer.attention.num_parameters(width) + layer.ffn.num_parameters(width)
        norms, projection = 5 * width, 2 * width * width
        return self.multi_token.depth * (own + norms + projection)

    @property
    def num_active_parameters(self) -> int:
        """Weights one token meets on average: its top_k experts instead of all, a layer with depth
        by its capacity, embeddings included."""
        return self._count(lambda ffn: ffn.num_active_parameters(self.d_model), is_active=True)

    def _count(
        self,
        ffn_parameters: typing.Callable[[DenseConfig | MoEConfig], int],
        is_active: bool = False,
    ) -> int:
        norms_per_layer = 2 * self.d_model

        def layer(spec: LayerSpec) -> int:
            weights = (
                spec.attention.num_parameters(self.d_model)
                + ffn_parameters(spec.ffn)
                + norms_per_layer
            )
            if spec.depth is None:
                return weights
            met = round(spec.depth.capacity * weights) if is_active else weights
            return met + self.d_model

        def count(specs: tuple[LayerSpec, ...]) -> int:
            return sum(layer(spec) for spec in specs)

        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        layers = count(self.prefix) + self.num_periods * count(self.pattern)
        return layers + embeddings + self.d_model
