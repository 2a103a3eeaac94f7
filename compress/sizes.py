"""Sizes of a pruned model: a share of each kind of unit, chosen to meet a count of parameters.

All layers of a kind keep as many units as each other, so that the result is an ordinary model.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError, require
from configs.feed_forward import GROUP_MEMBERS, MoEConfig, NoFeedForwardConfig

Axis = Literal["heads", "ffn", "width", "experts"]
AXES: tuple[Axis, ...] = ("heads", "ffn", "width", "experts")
"""heads: attention heads, in groups of one key/value head. ffn: hidden channels of dense layers, of
shared experts and of each expert. width: d_model. experts: routed experts."""
SHARES = [share / 500 for share in range(500, 4, -1)]
"""Tried in this order."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How small; exactly one is set."""

    keep: float | None = None
    """Share of the parameters outside embedding and output layer."""
    parameters: int | None = None
    active_parameters: int | None = None

    def __post_init__(self) -> None:
        set_ones = [
            x for x in (self.keep, self.parameters, self.active_parameters) if x is not None
        ]
        require(
            len(set_ones) == 1,
            "name one of --keep, --parameters, --active-parameters, or what goes by itself "
            "(--experts, --layers)",
        )
        require(
            self.keep is None or 0 < self.keep <= 1, f"keep={self.keep} must lie in (0, 1]"
        )  # fmt: skip

    def is_met(self, before: ModelConfig, after: ModelConfig) -> bool:
        if self.keep is not None:
            return _inner(after) <= self.keep * _inner(before)
        if self.parameters is not None:
            return after.num_parameters <= self.parameters
        assert self.active_parameters is not None
        return after.num_active_parameters <= self.active_parameters

    def __str__(self) -> str:
        if self.keep is not None:
            return f"{self.keep:.0%} of the layers' parameters"
        if self.parameters is not None:
            return f"{self.parameters:,} parameters"
        return f"{self.active_parameters:,} active parameters"


def _inner(config: ModelConfig) -> int:
    """Parameters outside embedding and output layer."""
    tables = 1 if config.tie_embeddings else 2
    return config.num_parameters - tables * config.vocab_size * config.d_model


def default_axes(config: ModelConfig, budget: Budget) -> tuple[Axis, ...]:
    """What goes where nobody says it: experts where there are some and all of them count, heads and
    channels elsewhere, d_model too where those alone would lose more than half.
    """
    has_experts = any(isinstance(spec.ffn, MoEConfig) for spec in config.layer_kinds)
    if has_experts and budget.active_parameters is None:
        return ("experts",)
    shares: dict[Axis, float] = {axis: 0.5 for axis in AXES if axis in ("heads", "ffn")}
    try:
        halved = shrunk_config(config, shares)
    except UserError:  # attention of another kind
        return ("ffn",)
    return ("heads", "ffn") if budget.is_met(config, halved) else ("heads", "ffn", "width")


def sized(config: ModelConfig, budget: Budget, axes: tuple[Axis, ...]) -> ModelConfig:
    """The largest model of these axes' shares, all alike, within the budget; then as many channels
    as still fit.

    Raises:
      UserError: none is small enough, or an axis that the model has not.
    """
    require_axes(config, axes)
    for share in SHARES:
        found = shrunk_config(config, dict.fromkeys(axes, share))
        if budget.is_met(config, found):
            return _widened(config, found, budget, axes, share)
    least = shrunk_config(config, dict.fromkeys(axes, SHARES[-1]))
    raise UserError(
        f"pruning {', '.join(axes)} leaves at least {least.num_parameters:,} parameters "
        f"({least.num_active_parameters:,} active), and {budget} were asked for: name more with "
        f"--axes {','.join(AXES)}, or drop layers with --layers"
    )


def _widened(
    config: ModelConfig, found: ModelConfig, budget: Budget, axes: tuple[Axis, ...], share: float
) -> ModelConfig:
    if "ffn" not in axes:
        return found
    for more in (s for s in reversed(SHARES) if s > share):
        shares = dict.fromkeys(axes, share)
        shares["ffn"] = more
        wider = shrunk_config(config, shares)
        if not budget.is_met(config, wider):
            break
        found = wider
    return found


def require_axes(config: ModelConfig, axes: Iterable[Axis]) -> None:
    """
    Raises:
      UserError: an axis that can't be pruned in this model.
    """
    kinds = config.layer_kinds
    require(
        all(s.has_attention and s.has_feed_forward for s in kinds),
        "layers that are an attention or a feed-forward alone are not pruned yet: distil such a "
        "model into another one",
    )
    for axis in axes:
        if axis in ("heads", "width"):
            other = [
                s.attention.kind for s in kinds if not isinstance(s.attention, AttentionConfig)
            ]
            require(
                not other,
                f"{axis} of attention of the kind {', '.join(sorted(set(other)))} can't be pruned: "
                "name other --axes (ffn, experts)",
            )
        if axis == "heads":
            require(
                all(getattr(s.attention, "qk_norm", None) != "all" for s in kinds),
                "this model norms queries of all heads together (qk_norm='all'), so heads can't "
                "go: name other --axes (ffn, width, experts)",
            )  # fmt: skip
        if axis == "experts":
            require(
                any(isinstance(s.ffn, MoEConfig) for s in kinds),
                "this model has no experts to prune: name other --axes (heads, ffn, width)",
            )


def shrunk_config(config: ModelConfig, shares: dict[Axis, float]) -> ModelConfig:
    """The model with a share of each kind of unit, each at least 1 of it.

    Raises:
      UserError: see `require_axes`.
    """
    require_axes(config, shares)

    def shrunk(spec: LayerSpec) -> LayerSpec:
        return shrunk_spec(spec, shares)

    width = counted(config.d_model, shares.get("width", 1.0))
    return dataclasses.replace(
        config,
        d_model=width,
        norm_eps=config.norm_eps * config.d_model / width,
        prefix=tuple(map(shrunk, config.prefix)),
        pattern=tuple(map(shrunk, config.pattern)),
        multi_token=None,
    )


def shrunk_spec(spec: LayerSpec, shares: dict[Axis, float]) -> LayerSpec:
    """A layer with a share of each kind of unit."""
    attention, ffn = spec.attention, spec.ffn
    if "heads" in shares:
        assert isinstance(attention, AttentionConfig)
        groups, each = fewer_heads(attention, shares["heads"])
        attention = dataclasses.replace(attention, num_heads=groups * each, num_kv_heads=groups)
    if "ffn" in shares and not isinstance(ffn, NoFeedForwardConfig):
        ffn = dataclasses.replace(ffn, d_ff=counted(ffn.d_ff, shares["ffn"]))
    if "experts" in shares and isinstance(ffn, MoEConfig):
        ffn = with_experts(ffn, fewer_experts(ffn, shares["experts"]))
    return dataclasses.replace(spec, attention=attention, ffn=ffn)


def counted(size: int, share: float) -> int:
    """A share of a size, of whole blocks of 32 where it has some (as formats of few bits need), or
    of 8.
    """
    block = 32 if size >= 128 else 8 if size >= 32 else 1
    return size if share >= 1 else max(int(share * size) // block * block, block)


def fewer_heads(attention: AttentionConfig, share: float) -> tuple[int, int]:
    """(key/value heads, query heads of each) nearest to a share of the query heads; of two as near,
    the one with more key/value heads.
    """
    groups, each = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    wanted = share * groups * each
    choices = [(g, r) for g in range(1, groups + 1) for r in range(1, each + 1)]
    return min(choices, key=lambda c: (abs(c[0] * c[1] - wanted), -c[0]))


def fewer_experts(ffn: MoEConfig, share: float) -> int:
    """Experts nearest to a share, that the router can choose among: top_k at least, and as many in
    each of its groups.
    """
    groups = ffn.router.num_groups or 1
    size = ffn.num_experts // groups
    least = -(-ffn.router.top_k // (ffn.router.top_groups or 1))
    if ffn.router.num_groups is not None:
        least = max(least, GROUP_MEMBERS[ffn.router.group_score])
    return groups * min(max(round(share * size), least, 1), size)


def with_experts(ffn: MoEConfig, count: int) -> MoEConfig:
    """The layer with so many experts; what warms twins up after growth is over."""
    router = dataclasses.replace(ffn.router, warmup=None)
    return dataclasses.replace(ffn, num_experts=count, router=router)


def parsed_count(text: str) -> int:
    """A count as people write it: 35M, 1.2B, 900k, 35000000.

    Raises:
      UserError: no such count.
    """
    factors = {"k": 1e3, "m": 1e6, "b": 1e9}
    number, factor = text.strip(), 1.0
    if number[-1:].lower() in factors:
        number, factor = number[:-1], factors[number[-1:].lower()]
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    require(1 <= value < 1e15, f"{text!r} is no count of parameters: write 35M, 1.2B or 35000000")
    return round(value)
