"""The feed-forward parts that a layer may have: dense, or experts and their router.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from configs.attention import AttentionConfig
from configs.checks import require, require_positive

SCORES = {"softmax", "sigmoid", "sqrt_softplus"}
"""Names of router scores: those of model/router_scores.py, and what a file of one's own adds there
(`add_scores`)."""
GroupScore = Literal["best_two", "best"]
DenseActivation = Literal["swiglu", "geglu", "bounded_swiglu", "relu2"]
GROUP_MEMBERS: dict[GroupScore, int] = {"best_two": 2, "best": 1}
"""Experts whose scores are summed for a group's."""


def num_parts(activation: str) -> int:
    """Matrices of hidden units: the gate's and the up's, or one where nothing is gated."""
    return 1 if activation == "relu2" else 2


@dataclass(frozen=True, kw_only=True)
class NoFeedForwardConfig:
    """No feed-forward: a layer that is an attention alone (Nemotron-H, 2025)."""

    kind: Literal["none"] = "none"

    @property
    def d_ff(self) -> int:
        """No hidden units."""
        return 0

    def num_parameters(self, d_model: int) -> int:
        del d_model
        return 0

    def num_active_parameters(self, d_model: int) -> int:
        return self.num_parameters(d_model)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense SwiGLU feed-forward layer: W_down(silu(W_gate x) * W_up x)."""

    kind: Literal["dense"] = "dense"
    d_ff: int
    """Hidden width, F."""
    activation: DenseActivation = "swiglu"
    """Of the gate: silu, or GELU in its tanh form (geglu: Gemma, 2024). bounded_swiglu: silu of the
    gate, which is bounded above by swiglu_limit, and up both ways (DeepSeek-V4, 2026). relu2: there
    is no gate, the layer is W_down relu(W_up x)^2 (So et al. 2021; Nemotron-H, 2025)."""
    bias: bool = False
    """Whether the matrices have biases (granite-8b-code)."""
    swiglu_limit: float | None = None
    """bounded_swiglu only (DeepSeek-V4: 10)."""

    def __post_init__(self) -> None:
        require_positive(self, "d_ff")
        _check_limit(self, ("bounded_swiglu",))

    def num_parameters(self, d_model: int) -> int:
        parts = num_parts(self.activation)
        biases = parts * self.d_ff + d_model if self.bias else 0
        return (parts + 1) * d_model * self.d_ff + biases

    def num_active_parameters(self, d_model: int) -> int:
        return self.num_parameters(d_model)


def _check_limit(config: "DenseConfig | MoEConfig", names: tuple[str, ...]) -> None:
    """swiglu_limit goes with these activations and only with them."""
    limit, activation = config.swiglu_limit, config.activation
    require(
        (limit is not None) == (activation in names),
        f"swiglu_limit={limit} goes with activation={' or '.join(map(repr, names))} and only with "
        f"it, got activation={activation!r}",
    )
    require(limit is None or limit > 0, f"swiglu_limit={limit} must be greater than 0")


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
        """Those of the router's logits included."""
        if self.kind == "correlation":
            return 3 * d_model * num_experts
        if self.kind == "causal":
            own = d_model * num_experts
            return own + self.num_heads * self.head_dim * (3 * d_model + num_experts)
        assert_never(self.kind)


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
    scores: str = "softmax"
    """Of the logits: softmax (Mixtral), sigmoid (DeepSeek-V3), sqrt_softplus (DeepSeek-V4), or
    one's own (model/router_scores.py)."""
    choice: Literal["scores", "token"] = "scores"
    """What decides: the best scores, or the token's own id by a table that no training changes,
    gates still the scores of what it names (Roller et al. 2021; DeepSeek-V4's first layers)."""
    normalize_gates: bool = True
    """Whether the chosen gates are rescaled to sum to 1."""
    gate_scale: float = 1.0
    """Factor of all gates (DeepSeek-V3: 2.5)."""
    gates_on: Literal["outputs", "inputs"] = "outputs"
    """What the gates multiply: what experts give, or what they read (Llama 4, 2025)."""
    expert_scales: bool = False
    """Whether each expert has a learned factor of its gates (Gemma 4, 2026)."""
    input_norm: bool = False
    """Whether the router reads the residual stream before the layer's norm, through an RMSNorm of
    its own and times d_model^-0.5 (Gemma 4)."""
    num_groups: int | None = None
    """Group-limited choice (DeepSeek-V3): experts lie in this many groups of neighbours ..."""
    top_groups: int | None = None
    """... and only those in this many best groups may be chosen."""
    group_score: GroupScore = "best_two"
    """What a group is judged by: the sum of its best two experts (DeepSeek-V3), or its best one
    (DeepSeek-V2, whose gates are not rescaled: normalize_gates=False and gate_scale=16)."""
    bias: bool = False
    """Whether the logits have a learned bias (gpt-oss)."""
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
    """loss_free: the bias's step (1e-3). quantile: how far it moves to its new value (0.5; slower
    ones lag behind a young router, at a cost in loss too)."""
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
        require(
            self.scores in SCORES,
            f"router.scores={self.scores!r} is none of {', '.join(sorted(SCORES))}: scores of your "
            "own are added by a file (model.router_scores.add_scores); name it with --experiment "
            "FILE.py, a run's own is RUN/experiment.py",
        )
        self._check_groups()
        self._check_nulls()
        self._check_choice()
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

    def _check_choice(self) -> None:
        is_free = self.num_groups is None and self.balance == "none" and self.context is None
        is_free &= self.num_null_experts == 0
        require(
            self.choice == "scores" or is_free,
            "router.choice='token' names the experts by a table: leave num_groups, balance, "
            "num_null_experts and context out",
        )
        weights = (self.load_balance_weight, self.sequence_weight, self.entropy_weight)
        require(
            self.choice == "scores" or not any(weights),
            "router.choice='token' has a load that no loss can change: set load_balance_weight, "
            "sequence_weight and entropy_weight to 0",
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
        require(
            groups is not None or self.group_score == "best_two",
            f"router.group_score={self.group_score!r} has no effect without router.num_groups: set "
            "num_groups and top_groups, or leave it out",
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
    shared_d_ff: int | None = None
    """Hidden width of that layer; None: num_shared_experts * d_ff (Nemotron 3 and Granite 4, 2025:
    one shared expert of a width of its own)."""
    shared_gate: bool = False
    """Whether the shared experts' result is multiplied by the sigmoid of a projection of the token
    (Qwen2-MoE, 2024)."""
    router: RouterConfig
    bias: bool = False
    """Whether the routed experts' matrices have biases (gpt-oss)."""
    latent_width: int | None = None
    """Width that tokens are projected to before the routed experts, and from after them: latent MoE
    (Nemotron 3, 2025). None: experts read and give d_model. Router and shared experts read the
    token itself."""
    activation: Literal["swiglu", "clamped_swiglu", "geglu", "bounded_swiglu", "relu2"] = "swiglu"
    """Of the routed experts. swiglu: silu(gate) * up. clamped_swiglu (gpt-oss, 2025): gate is
    bounded above and up both ways by swiglu_limit, then (up + 1) * gate * sigmoid(swiglu_alpha *
    gate). geglu: gelu(gate) * up, of the shared experts too (Gemma 4, 2026). bounded_swiglu: that
    of DenseConfig, of the shared experts too (DeepSeek-V4, 2026). relu2: relu(up)^2 without a gate,
    of the shared experts too (Nemotron 3)."""
    swiglu_limit: float | None = None
    """clamped_swiglu and bounded_swiglu only (gpt-oss: 7, DeepSeek-V4: 10)."""
    swiglu_alpha: float | None = None
    """clamped_swiglu only (gpt-oss: 1.702)."""

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "d_ff")
        require(
            self.num_shared_experts >= 0,
            f"num_shared_experts={self.num_shared_experts} must not be negative",
        )
        require(
            self.num_shared_experts > 0 or not self.shared_gate,
            "shared_gate=True has no effect with num_shared_experts=0: leave it out",
        )
        for name in ("shared_d_ff", "latent_width"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be at least 1, or None")
        require(
            self.num_shared_experts > 0 or self.shared_d_ff is None,
            f"shared_d_ff={self.shared_d_ff} has no effect with num_shared_experts=0: leave it out",
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
        self._check_activation()

    def _check_groups(self) -> None:
        groups, best = self.router.num_groups, self.router.top_groups
        if groups is None or best is None:
            return
        size, least = self.num_experts // groups, GROUP_MEMBERS[self.router.group_score]
        require(
            self.num_experts % groups == 0 and size >= least,
            f"num_experts={self.num_experts} must be divisible into router.num_groups={groups} "
            f"groups of at least {least}",
        )
        require(
            self.router.top_k <= best * size,
            f"router.top_k={self.router.top_k} must not exceed the {best * size} experts of "
            f"router.top_groups={best} groups",
        )

    def _check_activation(self) -> None:
        _check_limit(self, ("clamped_swiglu", "bounded_swiglu"))
        alpha = self.swiglu_alpha
        require(
            (alpha is not None) == (self.activation == "clamped_swiglu"),
            f"swiglu_alpha={alpha} goes with activation='clamped_swiglu' and only with it, got "
            f"activation={self.activation!r}",
        )
        require(alpha is None or alpha > 0, f"swiglu_alpha={alpha} must be greater than 0")

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts together."""
        return self.shared_d_ff or self.num_shared_experts * self.d_ff

    @property
    def shared_activation(self) -> DenseActivation:
        """Of the shared experts."""
        return "swiglu" if self.activation == "clamped_swiglu" else self.activation

    def _num_parameters(self, d_model: int, experts: float) -> int:
        parts, width = num_parts(self.activation), self.latent_width or d_model
        shared = num_parts(self.shared_activation) + 1
        ffns = round((parts + 1) * width * self.d_ff * experts)
        ffns += shared * d_model * self.shared_width
        ffns += 0 if self.latent_width is None else 2 * d_model * self.latent_width
        biases = round((parts * self.d_ff + width) * experts) if self.bias else 0
        context = self.router.context
        logits = d_model * self.num_experts
        if context is not None:
            logits = context.num_parameters(d_model, self.num_experts)
        own = self.num_experts if self.router.bias else 0
        own += d_model if self.shared_gate else 0
        own += self.num_experts if self.router.expert_scales else 0
        own += d_model if self.router.input_norm else 0
        return ffns + biases + own + logits

    def num_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.num_experts)

    def num_active_parameters(self, d_model: int) -> int:
        return self._num_parameters(d_model, self.router.mean_k)


FeedForward = DenseConfig | MoEConfig | NoFeedForwardConfig
