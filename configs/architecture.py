"""Model architecture, layer by layer: the part of a config that its checkpoint depends on.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

import typing
from dataclasses import dataclass
from typing import Literal

from configs.attention import Attention
from configs.attention_traits import NoAttentionConfig
from configs.checks import require, require_choices, require_finite, require_positive
from configs.feed_forward import DenseConfig, FeedForward, MoEConfig, NoFeedForwardConfig
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from configs.shared_keys import key_sources, shares_keys, sharing_setting


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig:
    """A layer that works on some of the tokens; the others pass by (Raposo et al. 2024)."""

    capacity: float
    """Share of a row's tokens that the layer works on (the paper: 0.125, every second layer)."""
    selection: Literal["top_capacity", "threshold"] = "top_capacity"
    """top_capacity: the best of the row, which looks ahead: for training. threshold: each token
    whose logit is above 0, by itself: for scoring and generating (model/depth.py:
    `with_threshold_selection`)."""
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
    weighting: Literal["quadratic", "uniform"] = "quadratic"
    """How exits' losses count against each other: the more the later (LayerSkip), or alike, each
    loss_scale against the last layer's 1. Drafts come from early exits, which uniform trains
    better."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"early_exit.dropout={self.dropout} must lie in [0, 1)")
        require_positive(self, "loss_scale", "rotation")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: which attention, which feed-forward, and whether tokens may pass it by; of a layer
    that is one of them alone, the other has kind="none"."""

    attention: Attention
    ffn: FeedForward
    depth: MixtureOfDepthsConfig | None = None
    norms: Literal["pre", "post", "sandwich"] = "pre"
    """Where attention and feed-forward are normed: what they read (pre), what they add to the
    residual stream (post: OLMo 2, 2025), or both (sandwich: Gemma 2, 2024)."""
    dense: DenseConfig | None = None
    """A dense layer beside the experts; both have norms of their own before and after, and what
    they give is added up and normed (Gemma 4, 2026)."""
    output_scale: bool = False
    """Whether the layer's result is multiplied by a factor of the layer (Gemma 4)."""

    @property
    def num_norms(self) -> int:
        """Norms of width d_model in the layer."""
        branches = int(self.has_attention) + int(self.has_feed_forward)
        each = 2 if self.norms == "sandwich" else 1
        return each * branches + (0 if self.dense is None else 3)

    @property
    def has_attention(self) -> bool:
        """Whether the layer mixes tokens."""
        return not isinstance(self.attention, NoAttentionConfig)

    @property
    def has_feed_forward(self) -> bool:
        """Whether the layer has one, dense or of experts."""
        return not isinstance(self.ffn, NoFeedForwardConfig)

    def __post_init__(self) -> None:
        require(
            self.has_attention or self.has_feed_forward,
            "a layer with attention.kind='none' and ffn.kind='none' does nothing: leave it out",
        )
        require(
            self.depth is None or self.has_feed_forward,
            "a layer with depth needs a feed-forward, got ffn.kind='none'",
        )
        reason = self.attention.unskippable_reason
        require(self.depth is None or reason is None, f"{reason}")
        require(
            self.dense is None or (isinstance(self.ffn, MoEConfig) and self.norms == "sandwich"),
            f"dense goes with experts and norms='sandwich', got ffn.kind={self.ffn.kind!r} and "
            f"norms={self.norms!r}: leave it out",
        )
        require(
            self.depth is None or (self.dense is None and not self.output_scale),
            "a layer with depth has neither dense nor output_scale: leave them out",
        )

    def num_other_parameters(self, d_model: int) -> int:
        """Weights beside attention and feed-forward: norms, the dense layer beside, the factor."""
        dense = 0 if self.dense is None else self.dense.num_parameters(d_model)
        return self.num_norms * d_model + dense + (1 if self.output_scale else 0)


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
        require(
            not shares_keys(self.layer.attention),
            f"multi_token.layer has attention.{sharing_setting(self.layer.attention)}, and a "
            "module has no layer before it: leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class HyperConnectionConfig:
    """Several residual streams, read and shared out by weights that the token itself gives
    (manifold-constrained hyper-connections; DeepSeek-V4, 2026). See model/hyper_connections.py."""

    num_streams: int = 4
    """N."""
    sinkhorn_steps: int = 20
    """Times that the sharing's columns are scaled to sum to 1."""
    eps: float = 1e-6
    """Least weight of a stream, and of what a sum is divided by."""

    def __post_init__(self) -> None:
        require_positive(self, "sinkhorn_steps", "eps")
        require(
            self.num_streams >= 2,
            f"hyper_connections.num_streams={self.num_streams} must be at least 2: one stream is "
            "the ordinary residual, leave hyper_connections out",
        )

    def num_parameters(self, d_model: int) -> int:
        """Of a layer: attention's mixing and the feed-forward's."""
        n = self.num_streams
        return 2 * (((2 + n) * n) * (n * d_model + 1) + 3)

    def num_end_parameters(self, d_model: int) -> int:
        """Of the sum that the last norm reads."""
        return self.num_streams * (self.num_streams * d_model + 1) + 1


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
    zero_centered_norms: bool = False
    """Whether the norms around the layers multiply by 1 + scale, and their scales begin at 0
    (Gemma, 2024; Qwen3-Next, 2025)."""
    embedding_scale: float = 1.0
    """Factor of what the embedding gives the first layer (Granite: 12)."""
    residual_scale: float = 1.0
    """Factor of what attention and feed-forward add to the residual stream (Granite: 0.22)."""
    logit_scale: float = 1.0
    """Factor of the logits (Granite: 1/8)."""
    logit_cap: float | None = None
    """Bound c of the logits, c * tanh(logit / c) (Gemma 2: 30)."""
    hyper_connections: HyperConnectionConfig | None = None
    """Set for several residual streams."""
    per_layer_embeddings: PerLayerEmbeddingConfig | None = None
    """Set for a table of the vocabulary with a vector for each layer."""
    early_exit: EarlyExitConfig | None = None
    exit_spacing: int | None = None
    """Layers between two exits of a model made for decoding (model/unstacked.py); None, as in
    training: those of the pattern."""
    multi_token: MultiTokenConfig | None = None
    """Modules that learn to predict further ahead; only training computes them."""

    def __post_init__(self) -> None:
        require_finite(self, "model")
        require_choices(self, "model")
        require_positive(self, "vocab_size", "d_model", "num_layers", "context_length", "norm_eps")
        require_positive(self, "embedding_scale", "residual_scale", "logit_scale")
        require(len(self.pattern) > 0, "pattern is empty: give at least one LayerSpec")
        require(
            self.num_layers > len(self.prefix)
            and (self.num_layers - len(self.prefix)) % len(self.pattern) == 0,
            f"num_layers={self.num_layers} must be the prefix's {len(self.prefix)} layers and a "
            f"multiple of the pattern's {len(self.pattern)} layers",
        )
        require(
            all(not isinstance(spec.ffn, MoEConfig) for spec in self.prefix),
            "prefix has an MoE layer: layers before the pattern must be dense",
        )
        require(
            all(spec.depth is None for spec in self.prefix),
            "prefix has a layer with depth: layers before the pattern work on every token",
        )
        require(
            self.multi_token is None or self.logit_scale == 1.0,
            f"logit_scale={self.logit_scale} is not built with multi_token, whose modules share "
            "the output layer: leave one of them out",
        )
        require(
            self.logit_cap is None or self.logit_cap > 0,
            f"logit_cap={self.logit_cap} must be greater than 0, or None for no bound",
        )
        self._check_early_exit()
        self._check_memory()
        self._check_streams()
        self._check_shared_keys()
        self._check_per_layer_embeddings()

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
            self.early_exit is None
            or self.early_exit.weighting == "uniform"
            or self.num_layers - periodic // self.num_exits >= 2,
            "early_exit would train nothing: its loss gives the exit after the first layer no "
            "weight, and there is no other; add layers",
        )

    def _check_memory(self) -> None:
        specs = (*self.prefix, *self.pattern)
        attentions = [spec.attention for spec in specs]
        memories = [a.memory_tokens for a in attentions if a.memory_tokens is not None]
        if not memories:
            return
        require(
            len(memories) == len(attentions),
            f"{len(memories)} of {len(attentions)} layers of prefix and pattern have relative "
            "attention: memory goes from segment to segment in every layer or in none, give all of "
            "them kind='relative'",
        )
        lengths = sorted(set(memories))
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

    def _check_streams(self) -> None:
        if self.hyper_connections is None:
            return
        require(
            all(s.has_attention and s.has_feed_forward for s in (*self.prefix, *self.pattern)),
            "hyper_connections is not built with layers that are an attention or a feed-forward "
            "alone: give each layer both",
        )
        require(
            self.early_exit is None and self.multi_token is None and self.residual_scale == 1.0,
            "hyper_connections is not built with early_exit, multi_token or a residual_scale: "
            "leave them out",
        )
        require(
            all(s.norms == "pre" and s.depth is None for s in (*self.prefix, *self.pattern)),
            "hyper_connections is not built with layers of norms='post' or 'sandwich' or with "
            "depth: leave them out",
        )
        require(
            not any(s.output_scale for s in (*self.prefix, *self.pattern)),
            "hyper_connections is not built with output_scale: leave it out",
        )

    def _check_shared_keys(self) -> None:
        specs = (*self.prefix, *self.pattern)
        settings = [sharing_setting(spec.attention) for spec in specs]
        setting = next((each for each in settings if each is not None), None)
        if setting is None:
            return
        require(
            all(spec.depth is None for spec in specs),
            f"attention.{setting} is not built in a model with depth, whose layers leave tokens "
            "out: leave one of them out",
        )
        require(
            self.hyper_connections is None and self.early_exit is None,
            f"attention.{setting} is not built with hyper_connections or early_exit: leave them "
            "out",
        )
        _ = self.key_sources  # each layer has one, or is refused

    def _check_per_layer_embeddings(self) -> None:
        if self.per_layer_embeddings is None:
            return
        require(
            all(spec.depth is None for spec in (*self.prefix, *self.pattern)),
            "per_layer_embeddings is not built in a model with depth, whose layers leave tokens "
            "out: leave one of them out",
        )
        require(
            self.hyper_connections is None
            and self.early_exit is None
            and self.multi_token is None
            and self.residual_scale == 1.0,
            "per_layer_embeddings is not built with hyper_connections, early_exit, multi_token or "
            "a residual_scale: leave them out",
        )

    @property
    def memory_length(self) -> int | None:
        """Tokens that each layer keeps from one segment to the next; None without memory."""
        return self.pattern[0].attention.memory_tokens

    @property
    def has_shared_keys(self) -> bool:
        """Whether a layer reads what another one made, its keys and values or its indexer's
        choice."""
        return any(shares_keys(spec.attention) for spec in (*self.prefix, *self.pattern))

    @property
    def key_sources(self) -> tuple[int | None, ...]:
        """Of each layer of the prefix and the pattern, the one whose keys or choice it reads: see
        configs/shared_keys.py."""
        prefix, pattern = (
            [spec.attention for spec in specs] for specs in (self.prefix, self.pattern)
        )
        return key_sources(prefix, pattern, self.num_periods)

    @property
    def num_looked_up_parameters(self) -> int:
        """Weights of which a token meets a row and multiplies by none: the embedding, where it is
        not the output layer too, and the table of per-layer embeddings."""
        widths = 0 if self.tie_embeddings else self.d_model
        if self.per_layer_embeddings is not None:
            widths += self.per_layer_embeddings.table_width(self.num_layers)
        return self.vocab_size * widths

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
        own += layer.num_other_parameters(width)
        norms, projection = 3 * width, 2 * width * width
        return self.multi_token.depth * (own + norms + projection)

    @property
    def num_active_parameters(self) -> int:
        """Weights one token meets on average: its top_k experts instead of all, a layer with depth
        by its capacity, embeddings included."""
        return self._count(lambda ffn: ffn.num_active_parameters(self.d_model), is_active=True)

    def _count(
        self,
        ffn_parameters: typing.Callable[[FeedForward], int],
        is_active: bool = False,
    ) -> int:
        streams, added = self.hyper_connections, self.per_layer_embeddings

        def layer(spec: LayerSpec) -> int:
            weights = (
                spec.attention.num_parameters(self.d_model)
                + ffn_parameters(spec.ffn)
                + spec.num_other_parameters(self.d_model)
                + (0 if streams is None else streams.num_parameters(self.d_model))
                + (0 if added is None else added.num_layer_parameters(self.d_model))
            )
            if spec.depth is None:
                return weights
            met = round(spec.depth.capacity * weights) if is_active else weights
            return met + self.d_model

        def count(specs: tuple[LayerSpec, ...]) -> int:
            return sum(layer(spec) for spec in specs)

        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        layers = count(self.prefix) + self.num_periods * count(self.pattern)
        end = self.d_model
        end += 0 if streams is None else streams.num_end_parameters(self.d_model)
        if added is not None:
            end += self.vocab_size * added.table_width(self.num_layers)
            end += added.num_shared_parameters(self.d_model, self.num_layers)
        return layers + embeddings + end
